"""Frames and world snapshots between processes: a ring of slots in shared memory. One writer, any number of readers.

A slot is guarded twice: a counter, odd while it is written, tells a reader to look again; a checksum of the pixels
makes sure on processors that reorder writes. Nobody ever waits. No simulator here: the runtime reads cameras with it.
"""

import mmap
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.interfaces import Frame
from onbeat.embodiment.errors import OnbeatError

SHARED_MEMORY = Path("/dev/shm")
_MAGIC = 0x6F6E_6265_6174_0001
_RING_WORDS = 8  # magic, slots, payload bytes, height, width, newest sequence
_SLOT_WORDS = 8  # guard, sequence, stamp, checksum
_SLOTS = 4
_TRIES = 8


class FramesMissing(OnbeatError):
    """The named ring is not there or is none of ours."""


class Stamped(NamedTuple):
    """A payload, copied out of the ring. sequence counts from 1."""

    sequence: int
    t_ns: int
    payload: NDArray[np.uint8]


class _Ring:
    """The mapped memory: words of the ring, words of each slot, payload of each slot."""

    def __init__(self, memory: mmap.mmap, slots: int, size: int) -> None:
        stride = _stride(size)
        flat = np.frombuffer(memory, np.uint8)
        self.head = flat[: _RING_WORDS * 8].view(np.int64)
        body = flat[_RING_WORDS * 8 :].reshape(slots, stride)
        self.words = [slot[: _SLOT_WORDS * 8].view(np.int64) for slot in body]
        self.payloads = [slot[_SLOT_WORDS * 8 : _SLOT_WORDS * 8 + size] for slot in body]


def _stride(size: int) -> int:
    return _SLOT_WORDS * 8 + (size + 63) // 64 * 64


class RingWriter:
    """Creates a ring named `name` for payloads of `size` bytes, and unlinks it when closed. shape: told to readers."""

    def __init__(self, name: str, size: int, shape: tuple[int, int] = (0, 0)) -> None:
        self.name = name
        self._path = SHARED_MEMORY / name
        self._path.unlink(missing_ok=True)
        fd = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.ftruncate(fd, _RING_WORDS * 8 + _SLOTS * _stride(size))
            self._ring: _Ring | None = _Ring(mmap.mmap(fd, 0), _SLOTS, size)
        finally:
            os.close(fd)
        self._sequence = 0
        self._ring.head[1:5] = _SLOTS, size, *shape
        self._ring.head[0] = _MAGIC

    def publish(self, payload: NDArray[np.uint8], t_ns: int) -> None:
        """Put a payload (size,) into the oldest slot and make it the newest."""
        assert self._ring is not None, "closed"
        sequence = self._sequence + 1
        words, target = self._ring.words[sequence % _SLOTS], self._ring.payloads[sequence % _SLOTS]
        words[0] += 1
        target[:] = payload
        words[1:4] = sequence, t_ns, zlib.crc32(target.data)
        words[0] += 1
        self._ring.head[5] = self._sequence = sequence

    def close(self) -> None:
        """Unlink the ring; readers keep what they have mapped. Closing twice is harmless."""
        self._ring = None
        self._path.unlink(missing_ok=True)


class RingReader:
    """Maps a ring that a `RingWriter` made. Raises FramesMissing."""

    def __init__(self, name: str) -> None:
        try:
            fd = os.open(SHARED_MEMORY / name, os.O_RDONLY)
        except OSError as fault:
            remedy = "start what fills them, and give their name under `cameras` in the robot file"
            raise FramesMissing(f"no frames are named {name}: {remedy}") from fault
        try:
            memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        except ValueError as fault:
            raise FramesMissing(f"{name} is empty: restart what fills it") from fault
        finally:
            os.close(fd)
        head = np.frombuffer(memory[: _RING_WORDS * 8].ljust(_RING_WORDS * 8, b"\0"), np.int64)
        if head[0] != _MAGIC:
            raise FramesMissing(f"{name} holds no frames of this version: restart what fills it with this version")
        self.shape = int(head[3]), int(head[4])
        self._ring: _Ring | None = _Ring(memory, int(head[1]), int(head[2]))

    @property
    def newest(self) -> int:
        """Sequence number of the newest payload; 0 when none has come."""
        assert self._ring is not None, "closed"
        return int(self._ring.head[5])

    def latest(self) -> Stamped | None:
        """A copy of the newest payload; None when none has come, or when the writer overtook every try."""
        assert self._ring is not None, "closed"
        for _ in range(_TRIES):
            sequence = self.newest
            if sequence == 0:
                return None
            taken = self._take(self._ring.words[sequence % _SLOTS], self._ring.payloads[sequence % _SLOTS])
            if taken is not None:
                return taken
        return None

    def close(self) -> None:
        """Closing twice is harmless."""
        self._ring = None

    @staticmethod
    def _take(words: NDArray[np.int64], source: NDArray[np.uint8]) -> Stamped | None:
        guard, sequence, t_ns, check = words[:4].tolist()
        payload = source.copy()
        if guard & 1 or words[0] != guard or zlib.crc32(payload.data) != check:
            return None
        return Stamped(sequence, t_ns, payload)


class FrameWriter:
    """A camera's sending end: frames (height, width, 3) uint8 RGB."""

    def __init__(self, name: str, height: int, width: int) -> None:
        self._writer = RingWriter(name, height * width * 3, (height, width))
        self.name = name

    def publish(self, rgb: NDArray[np.uint8], t_capture_ns: int) -> None:
        """Make `rgb` the newest frame. t_capture_ns: monotonic clock."""
        self._writer.publish(rgb.reshape(-1), t_capture_ns)

    def close(self) -> None:
        self._writer.close()


class SharedFrameCamera:
    """`Camera` over a ring that another process fills. ring: its name, as the twin prints it. Raises FramesMissing."""

    def __init__(self, ring: str, name: str) -> None:
        self.name = name
        self._reader = RingReader(ring)
        self._newest: Frame | None = None

    def __enter__(self) -> "SharedFrameCamera":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()

    def latest(self) -> Frame | None:
        """The newest complete frame, the same object until a newer one has come; None when none has."""
        if self._newest is None or self._reader.newest != self._newest.sequence:
            taken = self._reader.latest()
            if taken is not None:
                height, width = self._reader.shape
                self._newest = Frame(taken.sequence, taken.t_ns, taken.payload.reshape(height, width, 3))
        return self._newest

    def close(self) -> None:
        self._reader.close()
