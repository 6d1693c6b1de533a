"""The recorder keeps what it is told, tells what it could not keep, and never makes anybody wait."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from onbeat.drivers.interfaces import Frame
from onbeat.runtime.faults import Fault, Level
from onbeat.runtime.flight import recorder as module
from onbeat.runtime.flight.encoding import Encoded
from onbeat.runtime.flight.inference import Inference
from onbeat.runtime.flight.messages import CHUNK, FORMAT, LETTERS
from onbeat.runtime.flight.reader import Log, read_log
from onbeat.runtime.flight.recorder import MOST_WAITING, Recorder
from onbeat.runtime.observation import Observation
from onbeat.runtime.profile.machine import MachineSampler
from onbeat.runtime.record import TickRing, new_tick_ring

SAMPLER = MachineSampler(("records",))
SIZES = {**dict.fromkeys(LETTERS, 0), "J": 2, "V": 2, "C": 3, "N": 2, "P": len(SAMPLER.probes)}
HEADER = {"format": FORMAT, "started_ns": 0, "cameras": ["top", "wrist"], "sizes": SIZES, "machine": SAMPLER.about()}
RING = 8


@pytest.fixture
def ring() -> TickRing:
    return new_tick_ring(2, RING)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "log"


def put(ring: TickRing, *, faults: int = 0, level: Level = Level.OK) -> None:
    k = int(ring.written[0])
    row, at = ring.rows[k % RING], k % RING
    row["number"], row["faults"], row["level"] = k, faults, level
    ring.due_ns[at], ring.goal_rad[at] = k, k
    ring.written[0] += 1


def inference(number: int, *, seen: tuple[int, int], asked: str = "lift", warning: str = "") -> Inference:
    """From frames of two cameras that were captured then."""
    frames = (Frame(t_ns, t_ns, np.full((2, 2, 3), t_ns, np.uint8)) for t_ns in seen)
    known = {"number": number, "published_ns": number, "targets_rad": np.ones((2, 2))}
    chunk = dict.fromkeys((field.name for field in CHUNK), 0) | known
    state = {"arm": np.array([0.5]), "gripper": np.array([0.25])}
    views: dict[str, Frame] = dict(zip(("top", "wrist"), frames, strict=True))
    return Inference(Observation(views, state, min(seen)), asked, chunk, warning)


def finish(recorder: Recorder, ring: TickRing) -> Log:
    recorder.finish(ring, {"error": None})
    return read_log(recorder.folder)


def test_ticks_inferences_and_the_end_are_kept(folder: Path, ring: TickRing):
    recorder = Recorder(folder, HEADER)
    put(ring)
    recorder.tell(inference(0, seen=(5, 7)))
    recorder.keep(ring)
    put(ring)
    log = finish(recorder, ring)
    assert log.records("/tick")["goal_rad"].tolist() == [[0, 0], [1, 1]]
    (seen,) = log.records("/observation")
    assert (seen["t_ns"], seen["captured_ns"].tolist(), seen["instruction"]) == (5, [5, 7], "lift")
    assert seen["position_rad"].tolist() == [0.5, 0.25]
    (chunk,) = log.records("/chunk")
    assert chunk["targets_rad"][:2].tolist() == [[1, 1], [1, 1]]
    assert np.isnan(chunk["targets_rad"][2]).all()
    assert [(t_ns, int(rgb[0, 0, 0])) for t_ns, rgb in log.frames("wrist")] == [(7, 7)]
    assert log.outcome is not None
    assert (log.outcome["error"], log.outcome["dropped"]) == (None, {})


def test_a_frame_that_two_inferences_saw_is_kept_once(folder: Path, ring: TickRing):
    recorder = Recorder(folder, HEADER)
    for number, seen in enumerate([(5, 7), (9, 7), (9, 11)]):
        recorder.tell(inference(number, seen=seen))
    log = finish(recorder, ring)
    assert [t_ns for t_ns, _ in log.frames("top")] == [5, 9]
    assert [t_ns for t_ns, _ in log.frames("wrist")] == [7, 11]
    assert log.records("/observation")["captured_ns"].tolist() == [[5, 7], [9, 7], [9, 11]]
    assert log.last_picture("top") == list(log.pictures("top"))[-1][2]


def test_faults_and_levels_are_events_at_the_tick_that_showed_them(folder: Path, ring: TickRing):
    recorder = Recorder(folder, HEADER)
    late, stale = 1 << Fault.CHUNK_LATE, 1 << Fault.CAMERA_STALE
    put(ring)
    put(ring, faults=late, level=Level.WARN)
    recorder.keep(ring)
    put(ring, faults=late | stale, level=Level.SLOW)
    put(ring, faults=stale, level=Level.SLOW)
    put(ring)
    told = [(event["t_ns"], event["event"], event["name"]) for event in finish(recorder, ring).events]
    assert told == [
        (1, "fault", "CHUNK_LATE"),
        (1, "level", "WARN"),
        (2, "fault", "CAMERA_STALE"),
        (2, "level", "SLOW"),
        (3, "fault_cleared", "CHUNK_LATE"),
        (4, "fault_cleared", "CAMERA_STALE"),
        (4, "level", "OK"),
    ]


def test_a_new_instruction_and_a_new_warning_are_events_of_the_first_chunk_of_them(folder: Path, ring: TickRing):
    recorder = Recorder(folder, HEADER)
    said = [("lift", ""), ("lift", "d is 9"), ("lift", "d is 9"), ("put it down", "d is 9"), ("put it down", "")]
    for number, (asked, warning) in enumerate(said):
        recorder.tell(inference(number, seen=(number, number), asked=asked, warning=warning))
    told = [(event["t_ns"], event["event"], event["name"]) for event in finish(recorder, ring).events]
    assert told == [
        (0, "instruction", "lift"),
        (1, "warning", "d is 9"),
        (3, "instruction", "put it down"),
        (4, "warning", ""),
    ]


def test_what_there_is_no_room_for_is_dropped_and_counted(folder: Path, ring: TickRing):
    recorder = Recorder(folder, HEADER)
    for number in range(MOST_WAITING + 3):
        recorder.tell(inference(number, seen=(number, number)))
    ring.dropped[0] = 2
    log = finish(recorder, ring)
    assert len(log.records("/chunk")) == MOST_WAITING
    assert log.outcome is not None
    assert log.outcome["dropped"] == {"/chunk": 3, "/tick": 2}


def test_the_machine_is_looked_at_and_the_disk_asked_when_it_is_time_to(
    folder: Path, ring: TickRing, monkeypatch: pytest.MonkeyPatch
):
    recorder = Recorder(folder, HEADER, sampler=SAMPLER)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    put(ring)
    recorder.keep(ring)
    assert (synced, len(read_log(folder).records("/tick"))) == ([], 0)
    monkeypatch.setattr(module, "SYNC_PERIOD_NS", 0)
    recorder.keep(ring)
    log = read_log(folder)
    assert len(synced) == 1
    assert len(log.records("/tick")) == 1
    assert log.records("/machine")["cpu_ns"].shape == (1, 2)
    recorder.finish(ring, {})


def test_a_disk_that_refuses_ends_the_log_where_it_was_whole(
    folder: Path, ring: TickRing, monkeypatch: pytest.MonkeyPatch
):
    recorder = Recorder(folder, HEADER)
    monkeypatch.setattr(module, "SYNC_PERIOD_NS", 0)
    put(ring)
    recorder.keep(ring)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse)
        put(ring)
        recorder.keep(ring)
    assert recorder.error == os.strerror(errno.ENOSPC)
    put(ring)
    log = finish(recorder, ring)
    assert log.records("/tick")["number"].tolist() == [0]
    assert (log.outcome, recorder.dropped["/tick"]) == (None, 1)
    assert log.problems[-1] == "the run was cut short: the log has no outcome"


def refuse(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_who_watches_is_told_everything_even_when_the_disk_refuses(folder: Path, ring: TickRing):
    seen: list[Encoded] = []
    recorder = Recorder(folder, HEADER, watch=seen.append)
    put(ring)
    recorder.keep(ring)
    recorder.error = "made by a test"
    recorder.tell(inference(0, seen=(5, 7)))
    recorder.finish(ring, {})
    assert [told.topic for told in seen] == [
        "/tick",
        "/camera/top",
        "/camera/wrist",
        "/observation",
        "/chunk",
        "/event",
        "/outcome",
    ]


def test_a_folder_that_takes_no_file_is_an_error_of_the_operating_system(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="exists"):
        Recorder(tmp_path / "file", HEADER)
