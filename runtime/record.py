"""What a run leaves behind: every tick and every chunk, kept in memory allocated at the start and written at the end.

The compiled loop puts its ticks into a ring that no lock guards, and a thread of Python's moves them to the log.

    ticks.npz    one entry per tick
    chunks.npz   one entry per inference, with its targets
    run.json     the header (config, versions, hashes) first, then how the run ended
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onbeat.kernels.arrays import copy_values
from onbeat.kernels.atomics import load_acquire, store_release
from onbeat.kernels.compiled import compiled
from onbeat.runtime.tick import RECORD

TICKS_FILE, CHUNKS_FILE, RUN_FILE = "ticks.npz", "chunks.npz", "run.json"
RING_TICKS = 8192  # 8 s at 1 kHz: a thread that is held up for that long loses ticks, which is counted

# T ticks, N chunks, H rows of a chunk, J joints.

STAGES = ("camera_age", "observe", "prefix", "flow", "publish")
CHUNK = np.dtype(
    [
        ("chunk_id", np.int64),  # as in the timeline, -1 when it was refused
        ("observed_ns", np.int64),  # capture time of the observation
        ("t0_ns", np.int64),  # when row 0 is due: then, or in mode sync when the chunk was published
        ("started_ns", np.int64),
        ("published_ns", np.int64),
        ("rows", np.int64),
        ("budget", np.int64),  # the delay d that was planned with
        ("delay", np.int64),  # rows locked to what was committed
        ("first_row", np.int64),  # the first row of its own, or why it was refused: timeline.REFUSALS
        *((f"{stage}_ns", np.int64) for stage in STAGES),
    ]
)


class TickRing(NamedTuple):
    """Ticks on their way out of the loop, of C that fit. Tick k lies at k % C.

    rows: (C,) of tick.RECORD. due_ns, start_ns: (C,) int64, monotonic. compute_ns, exchange_ns: how long the tick and
    the bus took; tell_ns: how long the tick *before* took from there to its end. outcome: of the exchange, as
    `exchange_joints`. goal_rad: (C, J), sent. What the tick saw, read in the exchange before: position_rad,
    velocity_rad_s, load, temperature_c (C, J) float64, servo_status (C, J) uint8, bus_fault, retries (C,) int64 as in
    safety.Inputs. written, taken, dropped: (1,) int64; the loop writes the first and the last, the thread that drains
    writes the second.
    """

    rows: NDArray[np.void]
    due_ns: NDArray[np.int64]
    start_ns: NDArray[np.int64]
    compute_ns: NDArray[np.int64]
    exchange_ns: NDArray[np.int64]
    tell_ns: NDArray[np.int64]
    outcome: NDArray[np.int64]
    bus_fault: NDArray[np.int64]
    retries: NDArray[np.int64]
    goal_rad: NDArray[np.float64]
    position_rad: NDArray[np.float64]
    velocity_rad_s: NDArray[np.float64]
    load: NDArray[np.float64]
    temperature_c: NDArray[np.float64]
    servo_status: NDArray[np.uint8]
    written: NDArray[np.int64]
    taken: NDArray[np.int64]
    dropped: NDArray[np.int64]


TICK_WORDS = ("due_ns", "start_ns", "compute_ns", "exchange_ns", "tell_ns", "outcome", "bus_fault", "retries")
TICK_JOINTS = ("goal_rad", "position_rad", "velocity_rad_s", "load", "temperature_c")
TICK_FIELDS = (*TICK_WORDS, *TICK_JOINTS, "servo_status")


def new_tick_ring(joints: int, capacity: int = RING_TICKS) -> TickRing:
    """An empty ring."""
    return TickRing(
        rows=np.zeros(capacity, RECORD),
        **{name: np.zeros(capacity, np.int64) for name in TICK_WORDS},
        **{name: np.zeros((capacity, joints)) for name in TICK_JOINTS},
        servo_status=np.zeros((capacity, joints), np.uint8),
        written=np.zeros(1, np.int64),
        taken=np.zeros(1, np.int64),
        dropped=np.zeros(1, np.int64),
    )


@compiled
def append_tick(ring, state, due_ns, start_ns, compute_ns, exchange_ns, tell_ns, outcome):
    """Put the tick that `state` has just made into the ring; into a full one nothing goes, and that is counted.

    Before `state` is told what the exchange brought: it goes to the next tick.
    """
    written = ring.written[0]
    if written - load_acquire(ring.taken, 0) >= ring.rows.shape[0]:
        ring.dropped[0] += 1
        return
    k = written % ring.rows.shape[0]
    ring.rows[k] = state.record[0]
    ring.due_ns[k], ring.start_ns[k], ring.outcome[k] = due_ns, start_ns, outcome
    ring.compute_ns[k], ring.exchange_ns[k], ring.tell_ns[k] = compute_ns, exchange_ns, tell_ns
    inputs = state.safety.inputs
    ring.bus_fault[k], ring.retries[k] = inputs.bus_fault[0], inputs.retries[0]
    copy_values(ring.goal_rad[k], state.command_q)
    copy_values(ring.position_rad[k], state.measured_q)
    copy_values(ring.velocity_rad_s[k], state.measured_dq)
    copy_values(ring.load[k], state.measured_load)
    copy_values(ring.temperature_c[k], inputs.temperature_c)
    copy_values(ring.servo_status[k], inputs.servo_status)
    store_release(ring.written, 0, written + 1)


class TickLog:
    """Room for `capacity` ticks; what comes after that is counted in `dropped` and not kept."""

    def __init__(self, capacity: int, joints: int) -> None:
        self._kept = new_tick_ring(joints, capacity)
        self.count = 0
        self.dropped = 0

    def take(self, ring: TickRing) -> int:
        """Move what the ring holds to here, in order; returns how many ticks came. One thread takes."""
        taken, written = int(ring.taken[0]), load_acquire(ring.written, 0)
        fits = min(written - taken, len(self._kept.rows) - self.count)
        source = np.arange(taken, taken + fits) % len(ring.rows)
        for name in ("rows", *TICK_FIELDS):
            getattr(self._kept, name)[self.count : self.count + fits] = getattr(ring, name)[source]
        self.count += fits
        self.dropped += written - taken - fits
        store_release(ring.taken, 0, written)
        return written - taken

    @property
    def nbytes(self) -> int:
        """Of all that it has room for."""
        return sum(array.nbytes for array in self._kept)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The kept ticks, (T,) or (T, J) each; the fields of tick.RECORD under their own names."""
        kept = slice(self.count)
        own = {name: getattr(self._kept, name)[kept] for name in TICK_FIELDS}
        return {**own, **{name: self._kept.rows[name][kept] for name in RECORD.names or ()}}


class ChunkLog:
    """Room for `capacity` chunks of up to `rows` rows."""

    def __init__(self, capacity: int, rows: int, joints: int) -> None:
        self.entries = np.zeros(capacity, CHUNK)
        self.targets = np.full((capacity, rows, joints), np.nan)
        self.count = 0
        self.dropped = 0

    def append(self, targets: NDArray[np.float64], entry: Mapping[str, int]) -> None:
        """Keep a chunk. targets: (R, J) rad as the policy gave them. entry: the fields of CHUNK but `rows`."""
        if self.count == len(self.entries):
            self.dropped += 1
            return
        values = {**entry, "rows": len(targets)}
        self.entries[self.count] = tuple(values[name] for name in CHUNK.names or ())
        self.targets[self.count, : len(targets)] = targets
        self.count += 1

    @property
    def nbytes(self) -> int:
        """Of all that it has room for."""
        return self.entries.nbytes + self.targets.nbytes

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The kept chunks, (N,) each, and targets (N, H, J)."""
        kept = slice(self.count)
        return {"targets": self.targets[kept], **{name: self.entries[name][kept] for name in CHUNK.names or ()}}


def save(folder: Path, *, ticks: TickLog, chunks: ChunkLog, run: Mapping[str, Any]) -> None:
    """Write the three files. run: header and outcome, as JSON takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / TICKS_FILE, allow_pickle=False, **ticks.arrays())
    np.savez(folder / CHUNKS_FILE, allow_pickle=False, **chunks.arrays())
    (folder / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]], dict[str, Any]]:
    """The three files of `save`: ticks, chunks, run."""
    ticks, chunks = (dict(np.load(folder / name)) for name in (TICKS_FILE, CHUNKS_FILE))
    return ticks, chunks, json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
