"""What the twin writes down, for the supervisor alone: the truth of the world, and when which goals came over the wire.

- truth.jsonl: a line per 100 ms and per event (`TruthLine`)
- wire.bin: `GOAL_RECORD`s, one per sync write of goal positions
- torque.jsonl: a line (`TorqueLine`) whenever a motor gets current that had none, or loses it
- twin.json: counts, at the end

All but the last can be followed while the twin runs, and are complete even when it is killed.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TRUTH_FILE = "truth.jsonl"
WIRE_FILE = "wire.bin"
TORQUE_FILE = "torque.jsonl"
COUNTS_FILE = "twin.json"
GOAL_RECORD = np.dtype([("t_ns", "<i8"), ("goal_steps", "<i2", (6,))])


@dataclass(frozen=True, slots=True)
class TruthLine:
    """t_ns: monotonic clock of this machine. event: None on a plain sample."""

    t_ns: int
    attempt: int
    cube_height_m: float
    lifted: bool
    successes: int
    failures: int
    event: str | None = None


@dataclass(frozen=True, slots=True)
class TorqueLine:
    """t_ns: monotonic clock. holds: per joint, whether its motor gets current. position_rad: where the joints were."""

    t_ns: int
    holds: list[bool]
    position_rad: list[float]


class Recorder:
    """Writes the files of one run into a folder; nothing but `close` waits for a disk."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._truth, self._torque = _Copied(folder / TRUTH_FILE), _Copied(folder / TORQUE_FILE)
        self._wire = _Copied(folder / WIRE_FILE)

    def add_truth(self, line: TruthLine) -> None:
        self._truth.write(_line(line))

    def add_goals(self, t_ns: int, goal_steps: list[int]) -> None:
        self._wire.write(np.array((t_ns, goal_steps), GOAL_RECORD).tobytes())

    def add_torque(self, line: TorqueLine) -> None:
        self._torque.write(_line(line))

    def close(self, counts: dict[str, int]) -> None:
        """Write the counts and wait until all is written."""
        (self._folder / COUNTS_FILE).write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
        for file in (self._truth, self._torque, self._wire):
            file.close()


class _Copied:
    """A file filled by a process of its own, out of a pipe, which holds 64 KiB: the goals of 15 s at 200 Hz.

    A file's write may wait for another's fsync, a pipe's does not. A thread would do so too, but might be put aside by
    the scheduler while it holds the interpreter; and a process still writes what a killed twin has said.
    """

    def __init__(self, path: Path) -> None:
        with path.open("wb") as file:  # in a session of its own: a terminal's Ctrl-C is not for it, the end of input is
            self._copier = subprocess.Popen(
                ["cat"], bufsize=0, stdin=subprocess.PIPE, stdout=file, start_new_session=True
            )

    def write(self, data: bytes) -> None:
        """At most PIPE_BUF bytes, which come whole. Raises BrokenPipeError when the file cannot be written."""
        assert self._copier.stdin is not None
        self._copier.stdin.write(data)

    def close(self) -> None:
        assert self._copier.stdin is not None
        self._copier.stdin.close()
        self._copier.wait()


def _line(record: TruthLine | TorqueLine) -> bytes:
    return (json.dumps(asdict(record)) + "\n").encode()


def read_truth(folder: Path) -> Iterator[TruthLine]:
    """The lines written so far; a last line that is still being written is left out."""
    text = (folder / TRUTH_FILE).read_text(encoding="utf-8")
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield TruthLine(**json.loads(line))


def read_torque(folder: Path) -> list[TorqueLine]:
    """All changes of torque so far."""
    text = (folder / TORQUE_FILE).read_text(encoding="utf-8")
    return [TorqueLine(**json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_goals(folder: Path) -> NDArray[np.void]:
    """All goal writes as `GOAL_RECORD`s; the record that a killed twin did not finish is left out."""
    data = (folder / WIRE_FILE).read_bytes()
    return np.frombuffer(data[: len(data) // GOAL_RECORD.itemsize * GOAL_RECORD.itemsize], GOAL_RECORD)


def read_counts(folder: Path) -> dict[str, int]:
    """What the twin counted; there once it has ended."""
    return json.loads((folder / COUNTS_FILE).read_text(encoding="utf-8"))
