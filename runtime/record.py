"""Every tick on its way out of the compiled loop: a ring that no lock guards, drained by a thread of Python's.

`flight/recorder.py` writes what is drained; benches and tests keep it in memory.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.errors import OnbeatError
from onbeat.kernels.arrays import copy_values
from onbeat.kernels.atomics import load_acquire, store_release
from onbeat.kernels.compiled import compiled
from onbeat.runtime.flight.messages import TICK_LOOP, TICK_RECORD, packed
from onbeat.runtime.tick import RECORD

RING_TICKS = 8192  # 8 s at 1 kHz: a thread that is held up for that long loses ticks, which is counted
SPARE_S = 10.0  # more than an undrained ring is asked for: a loop is told late, and its arm takes up to 2 s to rest

# T ticks, J joints.


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


def new_tick_ring(joints: int, capacity: int = RING_TICKS) -> TickRing:
    """An empty ring."""
    fields: dict[str, Any] = {f.name: np.zeros((capacity, joints) if f.shape else capacity, f.kind) for f in TICK_LOOP}
    words: dict[str, Any] = {name: np.zeros(1, np.int64) for name in ("written", "taken", "dropped")}
    return TickRing(rows=np.zeros(capacity, RECORD), **fields, **words)


def undrained_tick_ring(joints: int, *, rate_hz: float, seconds: float) -> TickRing:
    """An empty ring that holds every tick of a loop that is told to end after `seconds`."""
    return new_tick_ring(joints, round(rate_hz * (seconds + SPARE_S)))


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


def take_ticks(ring: TickRing) -> NDArray[np.void]:
    """Move what the ring holds out of it, in order: (T,) records of /tick. One thread takes."""
    taken, written = int(ring.taken[0]), load_acquire(ring.written, 0)
    source = np.arange(taken, written) % len(ring.rows)
    ticks = np.empty(len(source), packed(TICK_RECORD + TICK_LOOP, {"J": ring.goal_rad.shape[1]}))
    for field in TICK_RECORD:
        ticks[field.name] = ring.rows[field.name][source]
    for field in TICK_LOOP:
        ticks[field.name] = getattr(ring, field.name)[source]
    store_release(ring.taken, 0, written)
    return ticks


class TicksLost(OnbeatError):
    """A record of a loop lacks ticks; what is said of the others is not said of the loop."""


def check_whole(ticks: NDArray[np.void], made: int) -> NDArray[np.void]:
    """`ticks` (T,), of a loop that made so many. Raises TicksLost when those are more."""
    if len(ticks) < made:
        raise TicksLost(f"{made - len(ticks)} of {made} ticks were not recorded: measure for a shorter time")
    return ticks


class TickLog:
    """Ticks in memory, as they are taken."""

    def __init__(self) -> None:
        self._taken: list[NDArray[np.void]] = []

    def take(self, ring: TickRing) -> int:
        """Move what the ring holds to here; returns how many ticks came. One thread takes."""
        ticks = take_ticks(ring)
        self._taken.append(ticks)
        return len(ticks)

    def records(self) -> NDArray[np.void]:
        """All of them, (T,) records of /tick. Something was taken before."""
        return np.concatenate(self._taken)
