"""`onbeat replay` from outside: verdicts, exit codes, and logs that are not what they should be."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onbeat.runtime.flight.encoding import JPEG, decode_frame, encode_frame
from onbeat.runtime.flight.messages import CAMERA
from onbeat.runtime.flight.reader import LogError, NoLog, read_log, read_messages
from onbeat.runtime.replay import replay as command
from onbeat.runtime.replay.layers import replay_recorded_chunks
from onbeat.runtime.replay.recording import NotReplayable, Recording, open_recording
from onbeat.runtime.replay.replay import DIFFERS, EXACT, INCOMPLETE, ROUNDING, VERDICTS, Result, as_json
from onbeat.runtime.replay.update import rewrite_files

SOME = 6  # chunks that a shortened log has


def rewritten(
    folder: Path,
    *,
    header: Mapping[str, Any] | None = None,
    drop: Callable[[str, int], bool] = lambda *_: False,
    change: Callable[[str, bytes], bytes] = lambda _, data: data,
) -> Path:
    """A log in `folder`, written again. drop: of a topic, its k-th message. change: a message's bytes."""
    counts: dict[str, int] = {}

    def each(topic: str, data: bytes) -> bytes | None:
        counts[topic] = counts.get(topic, -1) + 1
        if topic == "/header":
            return json.dumps({**json.loads(data), **(header or {})}).encode()
        return None if drop(topic, counts[topic]) else change(topic, data)

    rewrite_files(sorted(folder.glob("*.mcap")), each)
    return folder


def shortened(folder: Path) -> Path:
    """A log with only some of its chunks, which is replayed in a second."""
    ticks = int(np.argmax(open_recording(folder).ticks["in_sight"] > SOME))
    counts = {"/chunk": SOME, "/tick": ticks}
    return rewritten(folder, drop=lambda topic, k: k >= counts.get(topic, k + 1))


def with_robot(folder: Path, **changed: Any) -> dict[str, Any]:
    config = read_log(folder).header["config"]
    return {"config": {**config, "robot": {**config["robot"], **changed}}}


def result_of(capsys: pytest.CaptureFixture[str], log: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = command.main([str(log), "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def layers_of(result: Mapping[str, Any]) -> Iterable[str]:
    return [layer["name"] for layer in result["layers"]]


class TestBadInput:
    def test_there_is_no_log(self, tmp_path: Path):
        with pytest.raises(NoLog, match="no flight log"):
            open_recording(tmp_path)

    def test_a_log_of_an_older_version_is_named_with_its_version(self, copy: Path, monkeypatch: pytest.MonkeyPatch):
        old = read_log(copy)
        header = {name: value for name, value in old.header.items() if name != "backend"}
        monkeypatch.setattr("onbeat.runtime.replay.recording.read_log", lambda _: replace(old, header=header))
        with pytest.raises(NotReplayable, match=r"onbeat 0\.1\.0 and cannot be replayed: use that version"):
            open_recording(copy)

    def test_a_log_whose_ticks_lack_a_field_names_it(self, copy: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("onbeat.runtime.replay.recording.TICK_NEEDS", ("moon_phase",))
        with pytest.raises(LogError, match=r"/tick\.moon_phase"):
            open_recording(copy)

    @pytest.mark.parametrize("robot", [{}, {"name": "x", "embodiment": "so101", "is_simulated": True, "wings": 2}])
    def test_a_robot_of_another_version(self, copy: Path, robot: dict[str, Any]):
        config = {**read_log(copy).header["config"], "robot": robot}
        with pytest.raises(NotReplayable, match="not one of this version"):
            open_recording(rewritten(copy, header={"config": config}))

    @pytest.mark.parametrize("topic", ["/tick", "/chunk"])
    def test_a_log_without_its_beginning_is_refused_with_the_remedy(self, copy: Path, topic: str):
        folder = rewritten(copy, drop=lambda name, k: name == topic and k < 10)
        with pytest.raises(NotReplayable, match=rf"first 10 {topic[1:]}s.*--log-budget-mb"):
            open_recording(folder)


class TestDamage:
    def test_a_truncated_log_is_replayed_as_far_as_it_goes(self, copy: Path, capsys: pytest.CaptureFixture[str]):
        path = copy / "000000.mcap"
        path.write_bytes(path.read_bytes()[:700_000])
        code, result = result_of(capsys, copy, "--layer", "ticks")
        assert (code, result["verdict"]) == (0, EXACT)
        assert 100 < result["layers"][0]["compared"]["/tick"] < 600
        assert any("cut off" in note for note in result["notes"])

    def test_after_a_dropped_tick_nothing_is_exact_and_that_is_said(self, copy: Path):
        recording = open_recording(rewritten(copy, drop=lambda topic, k: topic == "/tick" and 50 <= k < 53))
        assert len(recording.ticks) == 50
        assert recording.notes == ("/tick: 3 records after number 49 were dropped: not replayed from there on",)

    def test_ticks_are_replayed_until_they_know_a_chunk_that_was_dropped(
        self, copy: Path, capsys: pytest.CaptureFixture[str]
    ):
        rewritten(copy, drop=lambda topic, k: topic == "/chunk" and k == 5)
        code, result = result_of(capsys, copy, "--layer", "ticks")
        assert code == 0
        assert "knew of chunk 5" in result["layers"][0]["stopped"]
        assert "/chunk: 1 records after number 4" in result["notes"][0]

    def test_a_chunk_whose_observation_was_lost_ends_the_chunks(self, copy: Path):
        recording = open_recording(rewritten(copy, drop=lambda topic, k: topic == "/observation" and k == 7))
        assert len(recording.chunks) == len(recording.observations) == 7
        assert "/observation: none of chunk 7" in recording.notes[0]

    def test_a_log_that_lost_its_chunks_says_that_no_tick_can_be_replayed(
        self, copy: Path, capsys: pytest.CaptureFixture[str]
    ):
        rewritten(copy, drop=lambda topic, _: topic in ("/chunk", "/observation"))
        code, result = result_of(capsys, copy, "--layer", "ticks")
        assert (code, result["verdict"]) == (1, INCOMPLETE)
        assert result["layers"][0]["compared"] == {"/tick": 0}
        assert "tick 0 knew of chunk 0" in result["layers"][0]["stopped"]


class TestBundle:
    def test_without_its_bundle_the_ticks_are_replayed_and_the_remedy_is_told(
        self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        monkeypatch.chdir(tmp_path)
        code, result = result_of(capsys, copy)
        assert (code, result["verdict"], layers_of(result)) == (1, INCOMPLETE, ["ticks"])
        assert "bundles/so101-lift' of the log is not there: give it with --bundle" in result["notes"][-1]

    def test_a_log_that_names_no_bundle_says_how_to_give_one(self, copy: Path, capsys: pytest.CaptureFixture[str]):
        config = {name: value for name, value in read_log(copy).header["config"].items() if name != "bundle"}
        code, result = result_of(capsys, rewritten(copy, header={"config": config}))
        assert (code, result["verdict"]) == (1, INCOMPLETE)
        assert "names no bundle: give the policy with --bundle" in result["notes"][-1]

    def test_another_bundle_is_not_taken_by_itself(self, copy: Path, bundle: Path, capsys: pytest.CaptureFixture[str]):
        config = {**read_log(copy).header["config"], "bundle": str(bundle)}
        rewritten(copy, header={"bundle_sha256": "0" * 64, "config": config})
        code, result = result_of(capsys, copy)
        assert (code, result["verdict"]) == (1, INCOMPLETE)
        assert "is not the one of the log" in result["notes"][-1]
        with pytest.raises(NotReplayable, match="is not the one of the log"):
            command.main([str(copy), "--layer", "chunks"])

    @pytest.mark.slow
    def test_another_bundle_that_is_insisted_on_is_compared_in_noise_floors(
        self, copy: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
    ):
        rewritten(shortened(copy), header={"bundle_sha256": "0" * 64})
        code, result = result_of(capsys, copy, "--bundle", str(bundle), "--layer", "chunks")
        assert (code, result["verdict"] in (EXACT, ROUNDING)) == (0, True)
        assert any(change.startswith("bundle: 000") for change in result["not_same"])

    def test_a_bundle_of_other_sizes_is_refused(self, copy: Path, bundle: Path):
        sizes = {**read_log(copy).header["sizes"], "T": 7}
        rewritten(copy, header={"sizes": sizes})
        with pytest.raises(NotReplayable, match="the bundle has T = 4, the log 7"):
            command.main([str(copy), "--bundle", str(bundle)])


class TestVerdict:
    @pytest.mark.slow
    def test_jpeg_frames_are_not_what_the_policy_saw(
        self, copy: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
    ):
        rewritten(shortened(copy), change=_as_jpeg)
        assert not open_recording(copy).is_lossless
        code, result = result_of(capsys, copy, "--bundle", str(bundle), "--layer", "chunks")
        assert (code, result["verdict"]) == (1, DIFFERS)
        assert "frames: the log's are JPEG, which are not what the policy saw" in result["not_same"]
        assert result["layers"][0]["fields"][0]["noise"] > 100

    @pytest.mark.slow
    def test_other_threads_are_named_and_judged_by_the_noise(
        self, copy: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
    ):
        shortened(copy)
        code, result = result_of(capsys, copy, "--bundle", str(bundle), "--threads", "2")
        assert code == 0
        assert "threads: 1 -> 2" in result["not_same"]
        assert list(layers_of(result)) == ["ticks", "chunks", "whole"]

    def test_a_difference_is_told_with_its_place(self, copy: Path, capsys: pytest.CaptureFixture[str]):
        rewritten(copy, header=with_robot(copy, slow_factor=0.3))
        assert command.main([str(copy), "--layer", "ticks"]) == 1
        told = capsys.readouterr().out
        assert "fields differ" in told
        assert "first: /tick goal_rad[" in told
        assert told.splitlines()[-1] == DIFFERS

    def test_a_number_that_is_none_is_text_in_json(self, recording: Recording):
        ticks = recording.ticks.copy()
        ticks["goal_rad"][5] = np.nan
        layer = replay_recorded_chunks(replace(recording, ticks=ticks))
        told = json.dumps(as_json(Result((layer,), (), {}, ())), allow_nan=False)
        assert json.loads(told)["layers"][0]["first"]["recorded"] == "nan"

    def test_verdicts_have_names_of_their_own(self):
        assert len(set(VERDICTS)) == 4


class TestUpdate:
    @pytest.mark.slow
    def test_what_is_replayed_becomes_the_record(self, copy: Path, bundle: Path, capsys: pytest.CaptureFixture[str]):
        """A robot that is accelerated less, and is meant to be."""
        shortened(copy)
        rewritten(copy, header=with_robot(copy, a_max=[19.0] * 6))
        seen = [read_log(copy).records(topic) for topic in ("/observation", "/tick")]
        assert command.main([str(copy), "--bundle", str(bundle)]) == 1
        assert command.main([str(copy), "--bundle", str(bundle), "--update"]) == 0
        assert "goal_rad" in capsys.readouterr().out
        assert command.main([str(copy), "--bundle", str(bundle)]) == 0
        kept = [read_log(copy).records(topic) for topic in ("/observation", "/tick")]
        assert (seen[0] == kept[0]).all()
        assert (seen[1]["load"] == kept[1]["load"]).all()
        assert (seen[1]["goal_rad"] != kept[1]["goal_rad"]).any()

    @pytest.mark.slow
    def test_an_update_of_what_is_exact_changes_no_record(self, copy: Path, bundle: Path):
        """The first makes it this machine's, if it is not."""
        shortened(copy)
        assert command.main([str(copy), "--bundle", str(bundle), "--update"]) == 0
        before = {path.name: list(read_messages(path, [])) for path in copy.glob("*.mcap")}
        assert command.main([str(copy), "--bundle", str(bundle), "--update"]) == 0
        for name, messages in before.items():
            after = list(read_messages(copy / name, []))
            assert [(topic, m.data) for topic, m in after[1:]] == [(topic, m.data) for topic, m in messages[1:]]

    def test_nothing_is_written_from_half_a_replay(self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        before = (copy / "000000.mcap").read_bytes()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(NotReplayable, match="nothing was written"):
            command.main([str(copy), "--update"])
        with pytest.raises(NotReplayable, match="an update takes every layer"):
            command.main([str(copy), "--update", "--layer", "ticks"])
        assert (copy / "000000.mcap").read_bytes() == before

    def test_the_reference_names_no_machine(self, flight: Path):
        header = read_log(flight).header
        assert header["config"]["robot"]["port"] == ""
        assert not any(str(value).startswith("/") for value in header["config"]["robot"].values())
        assert sum(path.stat().st_size for path in flight.iterdir()) < 3_000_000


def _as_jpeg(topic: str, data: bytes) -> bytes:
    if not topic.startswith(CAMERA):
        return data
    t_capture_ns, rgb = decode_frame(data)
    return encode_frame(rgb, t_capture_ns, topic.removeprefix(CAMERA), JPEG)
