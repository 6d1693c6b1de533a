"""What a view shows is what the log says, read back from a Rerun recording; and nobody waits for it."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onbeat.runtime.flight import view, view_pipe
from onbeat.runtime.flight.encoding import Encoded, encode_frame, split_frame
from onbeat.runtime.flight.messages import CHUNK_STAGES, FORMAT, LETTERS
from onbeat.runtime.flight.view_pipe import ViewPipe, read_pipe
from onbeat.runtime.flight.writer import LogWriter

pytestmark = pytest.mark.alone

chunk_module = pytest.importorskip("rerun.chunk")

S = 1_000_000_000
SIZES = {**dict.fromkeys(LETTERS, 0), "J": 2, "V": 1, "C": 4, "K": 1, "T": 2}
HEADER = {
    "format": FORMAT,
    "started_ns": 5 * S,
    "joints": ["pan", "lift"],
    "cameras": ["top"],
    "sizes": SIZES,
    "policy_period_ns": S // 10,
}
TICKS = 45
NOT_READING = (sys.executable, "-c", "import time; time.sleep(60)")


def numbered(topic: str, log: LogWriter, **values: Any) -> dict[str, Any]:
    """The values of a message, 0 where not given."""
    layout = log._layouts[topic]
    return {name: np.zeros(layout.fixed[name].shape) for name in layout.fixed.names or ()} | values


def write_log(folder: Path) -> None:
    with LogWriter(folder, HEADER) as log:
        for k in range(TICKS):
            due_ns = 6 * S + k * S // 200
            joints = {"goal_rad": [k, -k], "position_rad": [k + 0.5, 0.25]}
            times = {"due_ns": due_ns, "start_ns": due_ns + 30_000, "exchange_ns": 2_000_000, "level": k % 2}
            log.write_values("/tick", numbered("/tick", log, **joints, **times), due_ns)
        for chunk_id, first_row in ((0, 1), (1, 1), (-1, -2)):
            stages = {f"{stage}_ns": (k + 1) * 1_000_000 for k, stage in enumerate(CHUNK_STAGES)}
            times = {"observed_ns": 6 * S, "t0_ns": 6 * S, "published_ns": 6 * S + S // 20 + chunk_id}
            rows = {"rows": 3, "targets_rad": np.arange(6).reshape(3, 2), "gate": np.full((1, 2), 0.75)}
            chunk = numbered("/chunk", log, chunk_id=chunk_id, first_row=first_row, **stages, **times, **rows)
            log.write_values("/chunk", chunk, 6 * S)
        log.write("/camera/top", encode_frame(np.full((4, 4, 3), 9, np.uint8), 6 * S, "top"), 6 * S)
        log.write_values("/event", {"t_ns": 6 * S, "event": "fault", "name": "CHUNK_LATE"}, 6 * S)
        log.write_values("/event", {"t_ns": 7 * S, "event": "warning", "name": ""}, 7 * S)
        log.write_values("/outcome", {"error": None}, 7 * S)


def shown(path: Path) -> dict[str, list[tuple[int, Any]]]:
    """What stands in a recording: entity -> (ns, value) in order of time, static things left out."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for chunk in chunk_module.RrdReader(path).stream():
        if chunk.is_static:
            continue
        table = chunk.to_record_batch()
        times = table.column(table.schema.get_field_index(view.TIMELINE)).cast("int64").to_pylist()
        for k, name in enumerate(table.schema.names):
            if name.split(":")[-1] in ("scalars", "text", "blob"):
                values = [value[0] for value in table.column(k).to_pylist()]
                found.setdefault(str(chunk.entity_path), []).extend(zip(times, values, strict=True))
    return {entity: sorted(rows, key=lambda row: row[0]) for entity, rows in found.items()}


@pytest.mark.slow
def test_a_recording_shows_what_is_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_log(tmp_path / "log")
    target = tmp_path / "run.rrd"
    assert view.main([str(tmp_path), "--to", str(target), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["shown"]["/tick"], told["problems"]) == (TICKS, [])
    rows = shown(target)
    times = [S + k * S // 200 for k in range(TICKS)]
    assert rows["/joints/pan/goal"] == [(t, k) for k, t in enumerate(times)]
    assert [value for _, value in rows["/joints/lift/measured"]] == [0.25] * TICKS
    assert {value for _, value in rows["/loop/lateness"]} == {0.03}
    assert [value for _, value in rows["/loop/reaction_level"]] == [k % 2 for k in range(TICKS)]
    assert rows["/joints/lift/chunk1"] == [(S, 1.0), (S + S // 10, 3.0), (S + S // 5, 5.0)]
    assert rows["/joints/lift/chunk0"] == rows["/joints/lift/chunk1"]
    assert not any(entity.endswith("chunk3") for entity in rows), "one that was refused has no path"
    assert [value for _, value in rows["/latency/flow"]] == [4.0] * 3
    assert [value for _, value in rows["/gate/gate"]] == [0.75] * 3
    assert rows["/events"] == [(S, "fault: CHUNK_LATE"), (2 * S, "warning: none")]
    ((at_ns, picture),) = rows["/camera/top"]
    assert at_ns == S
    frame = encode_frame(np.full((4, 4, 3), 9, np.uint8), 6 * S, "top")
    assert bytes(picture) == split_frame(frame)[2]


def test_a_log_of_another_version_is_shown_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with LogWriter(tmp_path, {**HEADER, "format": 0}) as log:
        log.write_values("/event", {"t_ns": 6 * S, "event": "level", "name": "OK"}, 6 * S)
    assert view.main([str(tmp_path), "--to", str(tmp_path / "run.rrd")]) == 0
    told = capsys.readouterr()
    assert "/event" in told.out
    assert told.err == f"onbeat view: format 0, this version reads {FORMAT}: fields may be missing\n"


@pytest.mark.slow
def test_rerun_opens_the_log_itself(tmp_path: Path):
    write_log(tmp_path)
    count: dict[str, int] = {}
    for chunk in chunk_module.McapReader(next(tmp_path.iterdir())).stream():
        if not chunk.is_static:
            count[str(chunk.entity_path)] = count.get(str(chunk.entity_path), 0) + chunk.num_rows
    assert (count["/tick"], count["/chunk"], count["/camera/top"]) == (TICKS, 3, 1)


def test_a_log_that_does_not_begin_shows_nothing(tmp_path: Path):
    (tmp_path / "000000.mcap").write_bytes(b"\x89MCAP0\r\n")
    with pytest.raises(view.ViewRefused, match=r"no header.*000000\.mcap is cut off after 8 bytes"):
        view.main([str(tmp_path), "--to", str(tmp_path / "run.rrd")])


class TestTarget:
    def test_without_the_package_it_says_which_to_install(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(view.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(view.ViewRefused, match=r"pip install 'onbeat\[view\]'"):
            view.check_target("run.rrd")

    def test_without_a_screen_it_says_where_else(self, monkeypatch: pytest.MonkeyPatch):
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(view.ViewRefused, match=r"--view run\.rrd"):
            view.check_target(view.LIVE)

    def test_a_file_of_another_kind_is_refused(self):
        with pytest.raises(view.ViewRefused, match=r"ends in \.rrd"):
            view.check_target("run.mp4")

    def test_files_and_viewers_elsewhere_are_taken(self):
        view.check_target("run.rrd")
        view.check_target("rerun+http://laptop:9876/proxy")


class TestPipe:
    def test_what_is_shown_arrives_whole_and_in_order(self, tmp_path: Path):
        copy = f"import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, open({str(tmp_path / 'copy')!r}, 'wb'))"
        items = [Encoded(f"/topic{k}", bytes([k]) * (k * 1000), k) for k in range(100)]
        with ViewPipe("", HEADER, command=(sys.executable, "-c", copy)) as pipe:
            for item in items:
                pipe.show(item)
                while pipe.dropped == 0 and pipe._unsent:
                    time.sleep(0.001)
                    pipe._send()
        with (tmp_path / "copy").open("rb") as stream:
            header, *arrived = read_pipe(stream)
        assert json.loads(header.message) == HEADER
        assert arrived == items

    def test_a_view_that_does_not_read_is_dropped_from_and_never_waited_for(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(view_pipe, "END_S", 0.0)
        with ViewPipe("", HEADER, command=NOT_READING) as pipe:
            for k in range(500):
                pipe.show(Encoded("/camera/top", bytes(10_000), k))
            assert 300 < pipe.dropped < 500

    def test_a_view_that_has_gone_disturbs_nobody(self):
        with ViewPipe("", HEADER, command=(sys.executable, "-c", "")) as pipe:
            pipe._process.wait()
            for k in range(5):
                pipe.show(Encoded("/tick", b"x", k))
            assert pipe.dropped >= 4

    def test_of_a_message_that_was_cut_there_is_nothing(self, tmp_path: Path):
        whole = view_pipe._HEAD.pack(3, 5, 7) + b"/tick" + b"abc"
        for cut in range(len(whole)):
            (tmp_path / "pipe").write_bytes(whole + whole[:cut])
            with (tmp_path / "pipe").open("rb") as stream:
                assert list(read_pipe(stream)) == [Encoded("/tick", b"abc", 7)]
