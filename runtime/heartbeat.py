"""The memory that a runtime shares with its guardian: the loop's progress, and whether anything is to be guarded.

A file in shared memory, so that it outlives the runtime. The loop writes the progress words (`mailbox.py`), its session
the phase, the guardian that it watches. The standard library is all that it needs.
"""

import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

SHARED_MEMORY = Path("/dev/shm")
TICKS, ENDED_NS = 0, 5  # as in mailbox.py, which the guardian is too small to import; a test compares them
WATCHED, PHASE = 14, 15
WORDS = 16
_WORD = struct.Struct("=q")

IDLE = 0  # nothing has torque because of this runtime
GUARDED = 1  # torque is on: whoever dies now leaves an arm that somebody has to bring to its end
DONE = 2  # ended as the robot file says: the guardian may go


class Beat(NamedTuple):
    """What a look shows. ticks: of the loop, 0 before its first. has_ended: it stopped ticking by its own decision."""

    phase: int
    ticks: int
    has_ended: bool

    @property
    def is_due(self) -> bool:
        """Whether the next look has to show more ticks."""
        return self.phase == GUARDED and self.ticks > 0 and not self.has_ended


class Heartbeat:
    """The mapped words. Made by the runtime with `create`, opened by the guardian by path. `words` is the memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("r+b") as file:
            self.words = mmap.mmap(file.fileno(), WORDS * _WORD.size)

    @classmethod
    def create(cls) -> "Heartbeat":
        """A new one, all words 0, named after this process."""
        path = SHARED_MEMORY / f"onbeat-{os.getpid()}-heartbeat-{os.urandom(4).hex()}"
        path.write_bytes(bytes(WORDS * _WORD.size))
        return cls(path)

    def look(self) -> Beat:
        return Beat(self._get(PHASE), self._get(TICKS), self._get(ENDED_NS) != 0)

    @property
    def is_watched(self) -> bool:
        return self._get(WATCHED) != 0

    def set_watched(self) -> None:
        self._set(WATCHED, 1)

    def set_phase(self, phase: int) -> None:
        self._set(PHASE, phase)

    def unlink(self) -> None:
        """Remove the name; whoever has it mapped keeps it. Twice is harmless."""
        self.path.unlink(missing_ok=True)

    def _set(self, word: int, value: int) -> None:
        _WORD.pack_into(self.words, word * _WORD.size, value)

    def _get(self, word: int) -> int:
        return _WORD.unpack_from(self.words, word * _WORD.size)[0]
