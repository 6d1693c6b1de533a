"""A profile says what the records say, of the worst run there is and of a good one; comparisons name what differs."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.flight.messages import BY_TOPIC, FORMAT, LETTERS, packed
from onbeat.runtime.flight.reader import NoLog
from onbeat.runtime.flight.writer import LogWriter
from onbeat.runtime.profile import compare, profile, profile_page
from onbeat.runtime.profile.conditions import UNKNOWN, conditions_words
from onbeat.runtime.profile.figures import FIELDS, START_NS, action_ages, after_start, measure
from onbeat.runtime.profile.profile_page import way
from onbeat.runtime.profile.spread import FASTER, SAME, SLOWER
from onbeat.runtime.report import read_run
from onbeat.runtime.run_records import RunRecords
from onbeat.runtime.summary import STAGES, stage_samples

RunOf = Callable[..., RunRecords]
MachineOf = Callable[..., Any]


def bare(run: RunRecords) -> RunRecords:
    """A run in which nothing happened."""
    ticks = type(run.ticks)(**{name: getattr(run.ticks, name)[:0] for name in run.ticks.__slots__})
    return replace(run, ticks=ticks, chunks=(), machine=None, warm_up_ns=(), faults={})


def test_a_run_in_which_nothing_happened_has_a_profile(run_of: RunOf):
    empty = bare(run_of(0, 2.0))
    figures = measure(empty, "out/x")
    assert json.loads(json.dumps(figures))["stages"]["flow"]["p50_ms"] is None
    assert (figures["threads"], figures["memory"], figures["action_age"]["n"]) == ({}, None, 0)
    assert set(dict(conditions_words(figures["conditions"])).values()) == {UNKNOWN}
    assert UNKNOWN in profile.as_text(figures)
    assert "Not recorded in this log" in profile_page.render(figures, empty)
    assert "no stage differs" in compare.as_text(compare.compare(empty, empty, [figures, figures]))


@pytest.mark.parametrize("seconds", [0.15, 0.5, 1.5])
def test_a_short_run_has_a_profile(run_of: RunOf, machine_of: MachineOf, seconds: float):
    run = run_of(0, seconds, machine=machine_of(seconds))
    figures = measure(run, "out/x")
    assert figures["stages"]["inference"]["p99_ms"] is None
    assert profile.as_text(figures)
    assert profile_page.render(figures, run)


def test_profile_json_is_the_table_of_fields(run_of: RunOf, machine_of: MachineOf):
    figures = measure(run_of(0, 5.0, machine=machine_of(5.0)), "out/x")
    assert list(figures) == [field.name for field in FIELDS]
    assert all(field.unit and field.meaning for field in FIELDS)
    assert json.loads(json.dumps(figures)) == figures


def test_the_start_is_counted_apart(run_of: RunOf):
    run = run_of(0, 5.0)
    slow = replace(run.chunks[2], published_ns=run.chunks[2].published_ns + 400_000_000)
    figures = measure(replace(run, chunks=(*run.chunks[:2], slow, *run.chunks[3:])), "out/x")
    inference = STAGES["inference"].name
    assert figures["cold"]["stages"][inference]["max_ms"] > 400 > figures["stages"][inference]["max_ms"]
    assert figures["cold"]["warm_up_ms"] == [812.0, 44.0]
    assert figures["cold"]["stages"][inference]["n"] + figures["stages"][inference]["n"] == len(run.chunks)
    assert (after_start(run).ticks.due_ns >= run.ticks.due_ns[0] + START_NS).all()


def test_ages_are_those_of_the_chunk_in_force(run_of: RunOf):
    run = run_of(0, 3.0)
    sent_ns, age_ns = action_ages(run)
    ran = run.ticks.chunk_id >= 0
    assert (sent_ns == run.ticks.sent_ns[ran]).all()
    seen = np.array([chunk.observed_ns for chunk in run.chunks])
    assert (age_ns == sent_ns - seen[run.ticks.chunk_id[ran]]).all()
    assert 100e6 <= age_ns.min() < age_ns.max() < 215e6


def test_the_way_from_frame_to_command_adds_up(run_of: RunOf):
    run = run_of(0, 5.0)
    parts = dict(way(run))
    assert sum(parts.values()) == pytest.approx(stage_samples(run)["frame_to_command"].mean() / 1e6)
    assert parts["flow"] == pytest.approx(22.0, rel=0.15)
    assert way(bare(run)) == []


def test_the_machine_is_summed_up(run_of: RunOf, machine_of: MachineOf):
    figures = measure(run_of(0, 30.0, machine=machine_of(throttled=True)), "out/x")
    threads = figures["threads"]
    assert threads["inference"]["cpu_share"] == pytest.approx(0.5)
    assert threads["inference"]["minor_faults"] == 180
    assert figures["memory"] == {
        "first_bytes": 200_000_000,
        "last_bytes": 200_060_000,
        "peak_bytes": 200_060_000,
        "minor_faults": 240,
        "major_faults": 0,
    }
    words = dict(conditions_words(figures["conditions"]))
    assert words["clocks"] == "gpu 1020 MHz pinned"
    assert words["temperature"] == "up to 61 °C (tj-thermal)"
    assert words["throttling"] == "gpu-throttle-alert 5% of the time, over-current oc3 12 times"
    assert words["load"] == "1.5, 17% busy, 0% stolen"


def test_a_page_shows_every_stage_and_needs_nothing_from_outside(run_of: RunOf, machine_of: MachineOf):
    run = run_of(0, 5.0, machine=machine_of(5.0))
    html = profile_page.render(measure(run, "out/x"), run)
    assert not re.search(r"https?://|//[a-z]|@import|<script|<link|url\(|nan|inf[^e]", html.replace("</", "<"))
    text = unescape(html)
    for stage in STAGES.values():
        assert f"histogram of {stage.name}" in text
    for words in ("chunk not finite, 1 ×", "deadline missed", "MAXN_SUPER", "waiting for the seam"):
        assert words in text, words


def test_a_page_escapes_what_comes_from_outside(run_of: RunOf):
    run = run_of(0, 2.0)
    run = replace(run, header={**run.header, "error": "<script>alert(1)</script>", "robot": "<b>"})
    html = profile_page.render(measure(run, "<i>"), run)
    assert "<script" not in html
    assert "<b>&lt;b&gt;" not in html
    assert "&lt;b&gt;" in html


def test_a_run_against_itself_and_one_of_the_same_do_not_differ(run_of: RunOf):
    a, again = run_of(0), run_of(1)
    profiles = [measure(run, "out/x") for run in (a, again)]
    for b in (a, again):
        result = compare.compare(a, b, profiles)
        assert {stage.verdict for stage in result.stages} == {SAME}
        assert result.differences == ()
    assert "no stage differs" in compare.as_text(result)


@pytest.mark.parametrize(("stage", "name"), [("flow", "flow"), ("exchange", "bus exchange")])
def test_a_fifth_more_in_a_stage_is_found_there(run_of: RunOf, stage: str, name: str):
    a, b = run_of(0), run_of(1, slower={stage: 1.2})
    profiles = [measure(run, "out/x") for run in (a, b)]
    result = compare.compare(a, b, profiles)
    verdicts = {of.stage: of.verdict for of in result.stages}
    expected = {name: SLOWER, **({"inference": SLOWER} if stage == "flow" else {})}
    assert verdicts == {**dict.fromkeys(verdicts, SAME), **expected}
    assert f"{name}: B is slower by" in compare.as_text(result)
    assert "--again" in compare.as_text(result)
    assert {s.stage: s.verdict for s in compare.compare(b, a, profiles).stages}[name] == FASTER
    as_json = compare.as_json(result)
    assert json.loads(json.dumps(as_json)) == as_json


def test_what_else_differs_is_named(run_of: RunOf, machine_of: MachineOf):
    a = measure(run_of(0, 3.0, machine=machine_of(3.0)), "a")
    hot = machine_of(3.0, gpu_mhz=900.0, throttled=True)
    other = replace(hot, about={**hot.about, "power_mode": "15W", "model": "Orin NX"})
    b = measure(run_of(1, 3.0, machine=other), "b")
    b = {**b, "bundle_sha256": "cd" * 32, "log_problems": ["cut off"]}
    b["config"] = {**b["config"], "threads": 2, "seed": 9, "robot": {**b["config"]["robot"], "name": "other"}}
    words = "\n".join(compare.differences(a, b))
    for part in (
        "bundle_sha256",
        "config.threads: not known against 2",
        "config.robot.name",
        "model",
        "power_mode: MAXN",
    ):
        assert part in words, part
    assert "gpu clock 17000000.gpu: median 1020 against 900 MHz" in words
    assert "B was throttled" in words
    assert "B: cut off" in words
    assert "seed" not in words
    assert "port" not in words
    assert list(compare.differences(a, a)) == []


@pytest.mark.parametrize(
    "arguments", [[], ["a", "--compare", "b", "c"], ["a", "--again", "b"], ["--compare", "a"], ["a", "--seconds", "3"]]
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        profile.main(arguments)
    assert ended.value.code == 2
    assert "usage: onbeat profile" in capsys.readouterr().err


def test_live_hands_on_what_it_does_not_know():
    options = profile.parse(["--live", "--seconds", "3", "--trace", "t", "--json", "--port", "/dev/x", "--arm"])
    assert options.run_arguments == ("--seconds", "3", "--port", "/dev/x", "--arm")
    assert (options.is_live, options.is_json, options.trace, options.log) == (True, True, Path("t"), None)


def test_live_refuses_a_real_arm_without_arm(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert profile.main(["--live", "--robot", "so101", "--port", "/dev/null", "--out", str(tmp_path)]) == 1
    assert "--arm" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_log", [False, True])
def test_a_live_run_that_fails_says_why_and_is_profiled_as_far_as_it_came(
    run_of: RunOf, has_log: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    if has_log:
        write_log(tmp_path, run_of(0, 1.0))
    monkeypatch.setattr(profile, "drive", lambda *_: (tmp_path, "servo 3 did not reply"))
    assert profile.main(["--live", "--seconds", "1"]) == 1
    told = capsys.readouterr()
    assert "servo 3 did not reply" in told.err
    assert ("frame to command" in told.out) == has_log
    assert (tmp_path / profile.PAGE_FILE).exists() == has_log


def test_a_folder_without_a_log_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert profile.main([str(tmp_path)]) == 1
    assert "holds no flight log" in capsys.readouterr().err
    with pytest.raises(NoLog):
        read_run(tmp_path)


def write_log(folder: Path, run: RunRecords) -> None:
    """The run, through the writer that the daemon uses."""
    sizes = {**dict.fromkeys(LETTERS, 0), "J": 2, "C": 8}
    told = {name: run.header[name] for name in ("started", "config", "mode", "versions", "git_commit", "bundle_sha256")}
    header = {
        **told,
        "format": FORMAT,
        "started_ns": int(run.ticks.due_ns[0]),
        "joints": list(run.joints),
        "cameras": [],
        "sizes": sizes,
        "policy_period_ns": run.policy_period_ns,
        "rate_hz": 100.0,
        "calibration_sha256": None,
    }
    with LogWriter(folder / "log", header) as log:
        for k in range(len(run.ticks.due_ns)):
            write(log, "/tick", sizes, {name: getattr(run.ticks, name)[k] for name in run.ticks.__slots__})
        for chunk in run.chunks:
            plain = {name: getattr(chunk, name) for name in chunk.__slots__ if name != "stages_ns"}
            write(log, "/chunk", sizes, {**plain, **{f"{name}_ns": took for name, took in chunk.stages_ns.items()}})
        outcome = {"status": {"missed": run.missed_ticks}, "bus": {"ok": 1}, "real_time": {}, "error": None}
        log.write_values("/outcome", {**outcome, "warm_up_ns": list(run.warm_up_ns)}, header["started_ns"])


def write(log: LogWriter, topic: str, sizes: Mapping[str, int], values: Mapping[str, Any]) -> None:
    """A message of which nothing but `values` matters here."""
    kinds = packed(BY_TOPIC[topic].fields, sizes)
    log.write_values(topic, {**{name: np.zeros((), kinds[name]) for name in kinds.names or ()}, **values}, 0)


def test_a_log_is_profiled_from_the_command_line(run_of: RunOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_log(tmp_path, run_of(0, 3.0))
    assert profile.main([str(tmp_path), "--trace", str(tmp_path / "t.pftrace")]) == 0
    out = capsys.readouterr().out
    assert "frame to command" in out
    assert "812.0, 44.0 ms" in out
    figures = json.loads((tmp_path / profile.JSON_FILE).read_text())
    assert (figures["ticks"], figures["chunks"], figures["missed_ticks"]) == (300, 30, 1)
    assert "<svg" in (tmp_path / profile.PAGE_FILE).read_text()
    assert (tmp_path / "t.pftrace").stat().st_size > 10_000
    assert profile.main([str(tmp_path / "log"), "--json", "--into", str(tmp_path / "elsewhere")]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == figures["stages"]
    assert (tmp_path / "elsewhere" / profile.PAGE_FILE).exists()
    assert profile.main(["--compare", str(tmp_path), str(tmp_path), "--json"]) == 0
    assert {stage["verdict"] for stage in json.loads(capsys.readouterr().out)["stages"]} <= {SAME, "too few samples"}


def test_files_that_cannot_be_written_are_told(run_of: RunOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_log(tmp_path, run_of(0, 1.0))
    (tmp_path / "taken").write_text("")
    assert profile.main([str(tmp_path), "--into", str(tmp_path / "taken")]) == 1
    assert "--into" in capsys.readouterr().err
    assert profile.main([str(tmp_path), "--trace", str(tmp_path / "nowhere" / "t")]) == 1
    assert "No such file or directory): name another file with --trace" in capsys.readouterr().err
    assert issubclass(profile.ProfileRefused, OnbeatError)


@pytest.mark.alone
@pytest.mark.slow
def test_a_live_run_of_the_twin_is_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert profile.main(["--live", "--seconds", "2.5", "--json", "--out", str(tmp_path)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ticks"] > 200
    assert figures["stages"]["frame to command"]["n"] > 5
    assert figures["threads"]["inference"]["cpu_share"] > 0
    assert len(figures["cold"]["warm_up_ms"]) == 2
    (folder,) = tmp_path.iterdir()
    assert {"profile.json", "profile.html", "log"} <= {path.name for path in folder.iterdir()}
