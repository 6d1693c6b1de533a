"""The memory that a runtime shares with its guardian: the loop's progress, and whether anything is to be guarded.

A file in shared memory, so that it outlives the runtime. The loop writes the progress words (`mailbox.py`), its session
the phase, how far the way to the parking pose is, and whether a servo must not go on holding; the guardian counts its
looks. The standard library is all that it needs.
"""

import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

SHARED_MEMORY = Path("/dev/shm")
TICKS, ENDED_NS = 0, 5  # as in mailbox.py, which the guardian is too small to import; a test compares them
WAY, LIMP, LOOKS, PHASE = 12, 13, 14, 15
WORDS = 16
_WORD = struct.Struct("=q")

IDLE = 0  # nothing has torque because of this runtime
GUARDED = 1  # torque is on: whoever dies now leaves an arm that somebody has to bring to its end
DONE = 2  # ended as the robot file says: the guardian may go


class Beat(NamedTuple):
    """What a look shows. ticks: of the loop, 0 before its first. has_ended: it stopped ticking by its own decision.

    way: goals that were sent on the way to the parking pose.
    """

    phase: int
    ticks: int
    has_ended: bool
    way: int = 0

    @property
    def is_ticking(self) -> bool:
        """Whether the next look has to show more ticks; before the first and after the last progress is slower."""
        return self.ticks > 0 and not self.has_ended


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
        """The runtime, as the guardian sees it."""
        return Beat(self._get(PHASE), self._get(TICKS), self._get(ENDED_NS) != 0, self._get(WAY))

    @property
    def looks(self) -> int:
        """How often the guardian has looked; it goes on for as long as somebody watches."""
        return self._get(LOOKS)

    def count_look(self) -> None:
        self._set(LOOKS, self.looks + 1)

    def set_phase(self, phase: int) -> None:
        self._set(PHASE, phase)

    def count_way(self) -> None:
        self._set(WAY, self._get(WAY) + 1)

    @property
    def is_limp(self) -> bool:
        """Whether a servo cannot be trusted to hold: torque off, whatever the robot file says."""
        return self._get(LIMP) != 0

    def set_limp(self) -> None:
        self._set(LIMP, 1)

    def unlink(self) -> None:
        """Remove the name; whoever has it mapped keeps it. Twice is harmless."""
        self.path.unlink(missing_ok=True)

    def _set(self, word: int, value: int) -> None:
        _WORD.pack_into(self.words, word * _WORD.size, value)

    def _get(self, word: int) -> int:
        return _WORD.unpack_from(self.words, word * _WORD.size)[0]
