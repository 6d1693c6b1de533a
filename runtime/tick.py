"""One tick: from the committed chunks to one safe command. The only code that turns chunks into commands.

The control loop, `evaluate` in simulated time and replay all call `tick(state, now_ns)`. It is compiled, works on the
preallocated arrays of `TickState`, allocates nothing, and reads as the sequence: look up by time, limit, check,
record.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from onbeat.kernels.limit import ACCELERATION, HELD, POSITION, VELOCITY, limit
from onbeat.runtime.timeline import EMPTY, SLOTS, Timeline, committed_target, new_timeline

REFUSED = 16  # the last check failed: the previous command was kept
STARTED = 32  # the first tick: the command is the measured position
FLAG_NAMES = {
    HELD: "held",
    POSITION: "position limit",
    VELOCITY: "velocity limit",
    ACCELERATION: "acceleration limit",
    REFUSED: "refused",
    STARTED: "started",
}

ROUNDING = 1e-9  # relative, and rad: the last check allows what rounding adds to a command made inside the limits

RECORD = np.dtype(
    [
        ("t_ns", np.int64),  # when the tick ran, monotonic
        ("chunk_id", np.int64),  # the chunk in force, -1 when none
        ("row", np.int64),  # its row, `length` once past its end, -1 when none
        ("fraction", np.float64),  # of the way to the next row
        ("age_ns", np.int64),  # since row 0 was due: how old the observation behind this command is
        ("flags", np.int64),
    ]
)


class JointLimits(NamedTuple):
    """Of the command, per joint (J,) float64: range in rad, largest speed in rad/s and acceleration in rad/s^2."""

    q_min: NDArray[np.float64]
    q_max: NDArray[np.float64]
    v_max: NDArray[np.float64]
    a_max: NDArray[np.float64]


class Counters(NamedTuple):
    """How many ticks ran, and in how many of them each thing happened: (1,) int64 each."""

    ticks: NDArray[np.int64]
    held: NDArray[np.int64]
    limited: NDArray[np.int64]
    refused: NDArray[np.int64]


class TickState(NamedTuple):
    """All that a tick reads and writes; J joints.

    The caller fills measured_q, measured_dq, measured_load (J,) before each tick and sends command_q (J,) rad after
    it. command_q is NaN until the first tick; command_v (J,) rad/s is its step over the period. target (J,) is the
    committed target before limits, NaN when no action was due. record: (1,) of RECORD, rewritten by each tick.
    """

    timeline: Timeline
    limits: JointLimits
    period_s: float
    measured_q: NDArray[np.float64]
    measured_dq: NDArray[np.float64]
    measured_load: NDArray[np.float64]
    target: NDArray[np.float64]
    command_q: NDArray[np.float64]
    command_v: NDArray[np.float64]
    next_q: NDArray[np.float64]
    next_v: NDArray[np.float64]
    counters: Counters
    record: NDArray[np.void]


def new_tick_state(limits: JointLimits, *, rate_hz: float, rows: int, slots: int = SLOTS) -> TickState:
    """A state before its first tick, for a loop of `rate_hz` and chunks of up to `rows` rows."""
    joints = len(limits.q_min)
    zeros = [np.zeros(joints) for _ in range(5)]
    nans = [np.full(joints, np.nan) for _ in range(3)]
    return TickState(
        timeline=new_timeline(rows, joints, slots),
        limits=limits,
        period_s=1.0 / rate_hz,
        measured_q=nans[0],
        measured_dq=zeros[0],
        measured_load=zeros[1],
        target=nans[1],
        command_q=nans[2],
        command_v=zeros[2],
        next_q=zeros[3],
        next_v=zeros[4],
        counters=Counters(*(np.zeros(1, np.int64) for _ in Counters._fields)),
        record=np.zeros(1, RECORD),
    )


@njit(cache=True)
def tick(state, now_ns):
    """Advance the command by one period and return the flags of what shaped it (HELD, POSITION, ..., REFUSED).

    state: TickState. now_ns: monotonic, or simulated. The first tick commands the measured position, at rest.
    """
    slot, row, fraction = committed_target(state.timeline, now_ns, state.target)
    if math.isnan(state.command_q[0]):
        flags = _start(state)
    else:
        limits = state.limits
        flags = limit(
            state.command_q,
            state.command_v,
            state.target,
            limits.q_min,
            limits.q_max,
            limits.v_max,
            limits.a_max,
            state.period_s,
            state.next_q,
            state.next_v,
        )
    if _is_safe(state.next_q, state.command_q, state.limits, state.period_s):
        state.command_q[:] = state.next_q
        state.command_v[:] = state.next_v
    else:
        state.command_v[:] = 0.0
        flags |= REFUSED
    _count(state.counters, flags)
    _write_record(state.record[0], state.timeline, now_ns, slot, row, fraction, flags)
    return flags


@njit(cache=True)
def _start(state):
    state.next_q[:] = state.measured_q
    state.next_v[:] = 0.0
    return STARTED


@njit(cache=True)
def _is_safe(next_q, command_q, limits, period_s):
    """Whether a command may go on the wire: finite, inside the position range or not further out, within the speed."""
    for j in range(next_q.shape[0]):
        if not math.isfinite(next_q[j]):
            return False
        if math.isnan(command_q[j]):
            continue
        if not min(limits.q_min[j], command_q[j]) <= next_q[j] <= max(limits.q_max[j], command_q[j]):
            return False
        if abs(next_q[j] - command_q[j]) > limits.v_max[j] * period_s * (1.0 + ROUNDING) + ROUNDING:
            return False
    return True


@njit(cache=True)
def _count(counters, flags):
    counters.ticks[0] += 1
    counters.held[0] += 1 if flags & HELD else 0
    counters.limited[0] += 1 if flags & (POSITION | VELOCITY | ACCELERATION) else 0
    counters.refused[0] += 1 if flags & REFUSED else 0


@njit(cache=True)
def _write_record(record, timeline, now_ns, slot, row, fraction, flags):
    record.t_ns = now_ns
    record.chunk_id = timeline.chunk_id[slot] if slot != EMPTY else EMPTY
    record.row = row
    record.fraction = fraction
    record.age_ns = now_ns - timeline.t0_ns[slot] if slot != EMPTY else 0
    record.flags = flags


def flag_names(flags: int) -> list[str]:
    """The names of the flags that are set."""
    return [name for flag, name in FLAG_NAMES.items() if flags & flag]
