"""A flight log as a replay needs it: what is whole of it, from where it cannot be exact, and why."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.flight.encoding import JPEG
from onbeat.runtime.flight.reader import Log, LogError, read_log
from onbeat.runtime.robots import Robot, RobotError, build_robot, from_json

# T ticks, N chunks.

CHUNK_NEEDS: Final = ("number", "met_ns", "inferred_ns", "executed", "targets_rad", "actions", "noise")
TICK_NEEDS: Final = ("number", "in_sight", "seen", "frame_ns", "bus_fault", "retries", "load", "servo_status")


class NotReplayable(LogError):
    """A log that a replay cannot begin with."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What can be replayed. ticks (T,), chunks (N,), observations (N,): records of the log, without a gap.

    notes: what is missing, and from where on the replay says nothing.
    """

    log: Log
    robot: Robot
    ticks: NDArray[np.void]
    chunks: NDArray[np.void]
    observations: NDArray[np.void]
    notes: tuple[str, ...]

    @property
    def config(self) -> Mapping[str, Any]:
        """What the runtime was told."""
        return self.log.header["config"]

    @property
    def instruction(self) -> str:
        """What the policy was asked to do at the start."""
        return self.config.get("instruction") or str(self.observations["instruction"][0])

    @property
    def mode(self) -> str:
        return self.log.header["mode"]

    @property
    def rows(self) -> int:
        """The most that a chunk has."""
        return int(self.log.header["sizes"]["C"])

    @property
    def is_lossless(self) -> bool:
        """Whether the frames are those that the policy saw, bit for bit."""
        first = (next(self.log.pictures(camera), None) for camera in self.log.cameras)
        return all(picture is None or picture[1] != JPEG for picture in first)


def open_recording(path: Path) -> Recording:
    """Read a log. Raises NoLog, LogError for one of another version, NotReplayable without its beginning."""
    log = read_log(path)
    if "backend" not in log.header:
        version = log.header.get("versions", {}).get("onbeat", "another version")
        raise NotReplayable(f"the log was written by onbeat {version} and cannot be replayed: use that version")
    ticks, chunks = _records(log, "/tick", TICK_NEEDS), _records(log, "/chunk", CHUNK_NEEDS)
    _check_beginning(ticks, chunks)
    ticks, tick_notes = _until_gap(ticks, "/tick")
    chunks, chunk_notes = _until_gap(chunks, "/chunk")
    chunks, observations, lost = _pair(chunks, _records(log, "/observation", ("t_ns", "captured_ns")))
    notes = (*log.problems, *tick_notes, *chunk_notes, *lost)
    return Recording(log, _robot(log), ticks, chunks, observations, notes)


def _robot(log: Log) -> Robot:
    try:
        return build_robot(from_json(log.header["config"]["robot"]))
    except (KeyError, TypeError) as problem:
        why = f"the log's robot is not one of this version ({problem})"
        raise NotReplayable(f"{why}: replay it with the version that wrote it") from None
    except RobotError as problem:
        raise NotReplayable(f"the log's robot is refused by this version: {problem}") from None


def _records(log: Log, topic: str, needs: tuple[str, ...]) -> NDArray[np.void]:
    """Those of a topic, none where the run ended before the first. Raises LogError for fields of another version."""
    if topic not in log.topics:
        return np.empty(0, [("number", np.int64), ("t_ns", np.int64)])
    return log.records(topic, *needs)


def _check_beginning(ticks: NDArray[np.void], chunks: NDArray[np.void]) -> None:
    for records, what in ((ticks, "ticks"), (chunks, "chunks")):
        if len(records) and records["number"][0] != 0:
            raise NotReplayable(
                f"the first {records['number'][0]} {what} are not in the log, and what follows depends on them: "
                "record with a larger --log-budget-mb"
            )


def _until_gap(records: NDArray[np.void], topic: str) -> tuple[NDArray[np.void], list[str]]:
    """The records up to the first that is missing."""
    gaps = np.flatnonzero(np.diff(records["number"]) != 1)
    if len(gaps) == 0:
        return records, []
    last, after = (int(records["number"][gaps[0] + k]) for k in (0, 1))
    note = f"{topic}: {after - last - 1} records after number {last} were dropped: not replayed from there on"
    return records[: gaps[0] + 1], [note]


def _pair(
    chunks: NDArray[np.void], observations: NDArray[np.void]
) -> tuple[NDArray[np.void], NDArray[np.void], list[str]]:
    """Chunks and the observation of each, up to the first without one."""
    index = {t_ns: k for k, t_ns in enumerate(observations["t_ns"].tolist())}
    found = [index.get(t_ns, -1) for t_ns in chunks["observed_ns"].tolist()] if len(chunks) else []
    whole = found.index(-1) if -1 in found else len(found)
    notes = [f"/observation: none of chunk {whole}: chunks are not replayed from there on"] if -1 in found else []
    return chunks[:whole], observations[np.array(found[:whole], np.int64)], notes


class Frames:
    """The frames of one camera in the order of their times, each read when it is asked for."""

    def __init__(self, log: Log, camera: str) -> None:
        self._coming: Iterator[tuple[int, NDArray[np.uint8]]] = log.frames(camera)
        self._newest: tuple[int, NDArray[np.uint8]] | None = None
        self.name = camera

    def at(self, t_capture_ns: int) -> NDArray[np.uint8] | None:
        """The frame (height, width, 3) of that time, or None when it is not there. Times asked for do not go back."""
        while self._newest is None or self._newest[0] != t_capture_ns:
            self._newest = next(self._coming, None)
            if self._newest is None:
                return None
        return self._newest[1]
