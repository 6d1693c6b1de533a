"""One tick: from the committed chunks to one safe command. The only code that turns chunks into commands.

The control loop, `evaluate` in simulated time and replay all call `tick(state, now_ns)`. It is compiled, works on the
preallocated arrays of `TickState`, allocates nothing, and reads as the sequence: look up by time, look for faults,
limit, stay in the workspace, smooth, check, record.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onbeat.kernels.arrays import copy_values, fill_values
from onbeat.kernels.atomics import store_release
from onbeat.kernels.compiled import compiled
from onbeat.kernels.kinematics import Workspace, leaves, no_workspace
from onbeat.kernels.limit import ACCELERATION, HELD, POSITION, VELOCITY, limit, smooth, smoothing_ticks
from onbeat.runtime.flight.messages import TICK_RECORD, packed
from onbeat.runtime.safety import (
    COMMAND_REFUSED,
    HOLD,
    SLOW,
    WORKSPACE,
    Safety,
    SafetySettings,
    fault_bits,
    is_pushing,
    new_safety,
    note_joints,
    note_late,
    watch,
)
from onbeat.runtime.timeline import EMPTY, SLOTS, Timeline, chunks_in_sight, committed_target_of, new_timeline

REFUSED = 16  # the last check failed: the previous command was kept
STARTED = 32  # the first tick: the command is the measured position
SLOWED = 64  # a fault scales the speed limit
STOPPED = 128  # a fault brought the arm to rest, or keeps it there
OUTSIDE = 256  # braked, or the tool would have left the workspace
GAVE_WAY = 512  # a joint that pushed for too long is drawn back to where it is
FLAG_NAMES = {
    HELD: "held",
    POSITION: "position limit",
    VELOCITY: "velocity limit",
    ACCELERATION: "acceleration limit",
    REFUSED: "refused",
    STARTED: "started",
    SLOWED: "slowed by a fault",
    STOPPED: "stopped by a fault",
    OUTSIDE: "workspace limit",
    GAVE_WAY: "gave way",
}

OVERREACH_RAD = 0.25  # a policy that points further out of a joint's range than this does not know where the arm is
GIVE_WAY_HZ = 6.0  # the rate at which a pushing joint's lead decays: 95 % in 0.5 s, before a servo gives up by itself
ROUNDING = 1e-9  # relative, and rad: the last check allows what rounding adds to a command made inside the limits

RECORD = packed(TICK_RECORD, {})


class JointLimits(NamedTuple):
    """Of the command, per joint (J,) float64: range in rad, largest rad/s, rad/s^2 and rad/s^3."""

    q_min: NDArray[np.float64]
    q_max: NDArray[np.float64]
    v_max: NDArray[np.float64]
    a_max: NDArray[np.float64]
    j_max: NDArray[np.float64]


class Counters(NamedTuple):
    """How many ticks ran, and in how many of them each thing happened: (1,) int64 each."""

    ticks: NDArray[np.int64]
    held: NDArray[np.int64]
    limited: NDArray[np.int64]
    refused: NDArray[np.int64]


class TickState(NamedTuple):
    """All that a tick reads and writes; J joints.

    The caller fills measured_q, measured_dq, measured_load (J,) and safety.inputs before each tick and sends command_q
    (J,) rad after it. command_q is NaN until the first tick; command_v (J,) rad/s is its step over the period, and
    command_a (J,) rad/s^2 that of command_v.
    target (J,) is the committed target before limits, NaN when no action was due; goal (J,) what the faults left of it.
    path_q, path_v (J,): the path inside the limits whose last smoothing[j] steps, kept in the ring `path` (N, J) with
    the newest at newest[0], are averaged to the command. v_max (J,): the speed limit of this tick. record: (1,) of
    RECORD, rewritten by each tick.
    """

    timeline: Timeline
    limits: JointLimits
    workspace: Workspace
    safety: Safety
    period_s: float
    measured_q: NDArray[np.float64]
    measured_dq: NDArray[np.float64]
    measured_load: NDArray[np.float64]
    target: NDArray[np.float64]
    goal: NDArray[np.float64]
    v_max: NDArray[np.float64]
    path_q: NDArray[np.float64]
    path_v: NDArray[np.float64]
    path: NDArray[np.float64]
    newest: NDArray[np.int64]
    smoothing: NDArray[np.int64]
    command_q: NDArray[np.float64]
    command_v: NDArray[np.float64]
    command_a: NDArray[np.float64]
    next_q: NDArray[np.float64]
    next_v: NDArray[np.float64]
    next_a: NDArray[np.float64]
    counters: Counters
    record: NDArray[np.void]


def new_tick_state(
    limits: JointLimits,
    *,
    rate_hz: float,
    rows: int,
    slots: int = SLOTS,
    workspace: Workspace | None = None,
    settings: SafetySettings | None = None,
) -> TickState:
    """A state before its first tick, for a loop of `rate_hz` and chunks of up to `rows` rows."""
    joints, period_s = len(limits.q_min), 1.0 / rate_hz
    smoothing = smoothing_ticks(limits.a_max, limits.j_max, period_s)
    zeros = [np.zeros(joints) for _ in range(10)]
    nans = [np.full(joints, np.nan) for _ in range(4)]
    return TickState(
        timeline=new_timeline(
            rows, joints, slots, lowest=limits.q_min - OVERREACH_RAD, highest=limits.q_max + OVERREACH_RAD
        ),
        limits=limits,
        workspace=no_workspace(joints) if workspace is None else workspace,
        safety=new_safety(joints, period_s, settings),
        period_s=period_s,
        measured_q=nans[0],
        measured_dq=zeros[0],
        measured_load=zeros[1],
        target=nans[1],
        goal=nans[2],
        v_max=zeros[2],
        path_q=zeros[3],
        path_v=zeros[4],
        path=np.zeros((int(smoothing.max()), joints)),
        newest=np.zeros(1, np.int64),
        smoothing=smoothing,
        command_q=nans[3],
        command_v=zeros[5],
        command_a=zeros[6],
        next_q=zeros[7],
        next_v=zeros[8],
        next_a=zeros[9],
        counters=Counters(*(np.zeros(1, np.int64) for _ in Counters._fields)),
        record=np.zeros(1, RECORD),
    )


@compiled
def tick(state, now_ns):
    """Advance the command by one period and return the flags of what shaped it (HELD, POSITION, ..., OUTSIDE).

    state: TickState. now_ns: monotonic, or simulated. The first tick commands the measured position, at rest.
    """
    in_sight = chunks_in_sight(state.timeline)
    chunk_id, t0_ns, row, fraction = committed_target_of(state.timeline, in_sight, now_ns, state.target)
    is_missing = math.isnan(state.target[0]) and in_sight > 0
    note_joints(state.safety, state.command_q, state.measured_q)
    level = watch(state.safety, now_ns, is_missing, state.measured_load)
    flags = _start(state) if math.isnan(state.command_q[0]) else _move(state, level)
    flags |= _commit(state)
    _count(state.counters, flags)
    _write_record(state, now_ns, in_sight, chunk_id, t0_ns, row, fraction, flags)
    store_release(state.timeline.progress_ns, 0, now_ns)
    return flags


@compiled
def _start(state):
    copy_values(state.path_q, state.measured_q)
    fill_values(state.path_v, 0.0)
    _fill_path(state, state.measured_q)
    copy_values(state.next_q, state.measured_q)
    fill_values(state.next_v, 0.0)
    fill_values(state.next_a, 0.0)
    return STARTED


@compiled
def _fill_path(state, q):
    for k in range(state.path.shape[0]):
        copy_values(state.path[k], q)


@compiled
def _move(state, level):
    """One step of the path towards what the faults leave of the target, and the command that it gives."""
    flags = _heed(state, level)
    flags |= _step(state, state.goal, state.next_q, state.next_v)
    is_outside = _leaves(state)
    if is_outside:
        flags = _stay_inside(state, flags) | OUTSIDE
    note_late(state.safety, WORKSPACE, is_outside)
    _extend_path(state)
    return flags


@compiled
def _leaves(state):
    """Whether the planned step leads the tool out of the workspace."""
    return leaves(state.path_q, state.next_q, state.next_v, state.limits.a_max, state.period_s, state.workspace)


@compiled
def _stay_inside(state, flags):
    """Plan the step that brakes instead, all joints but those that give way; them too where that would lead out."""
    if flags & GAVE_WAY != 0:
        fill_values(state.goal, np.nan)
        flags |= _give_way(state) | _step(state, state.goal, state.next_q, state.next_v)
        if not _leaves(state):
            return flags
    return _brake(state, flags & ~GAVE_WAY)


@compiled
def _heed(state, level):
    """Set goal and v_max of this tick from the target and the level of the faults."""
    copy_values(state.goal, state.target)
    copy_values(state.v_max, state.limits.v_max)
    flags = 0
    if level >= HOLD:
        fill_values(state.goal, np.nan)
        flags = STOPPED
    elif level == SLOW:
        for j in range(state.v_max.shape[0]):
            state.v_max[j] *= state.safety.thresholds.slow_factor
        flags = SLOWED
    return flags | _give_way(state)


@compiled
def _give_way(state):
    """Draw the joints that push for too long back to where they are: a hold would push on until the servo gives up.

    Slower as they come closer, so that a grip is eased and not opened; faster than SLOW, as only the command moves.
    """
    flags = 0
    for j in range(state.goal.shape[0]):
        if is_pushing(state.safety, j, state.measured_load[j]):
            state.goal[j] = state.measured_q[j]
            speed = GIVE_WAY_HZ * abs(state.path_q[j] - state.measured_q[j])
            state.v_max[j] = min(state.limits.v_max[j], speed)
            flags = GAVE_WAY
    return flags


@compiled
def _step(state, goal, out_q, out_v):
    limits = state.limits
    return limit(
        state.path_q,
        state.path_v,
        goal,
        limits.q_min,
        limits.q_max,
        state.v_max,
        limits.a_max,
        state.period_s,
        out_q,
        out_v,
    )


@compiled
def _brake(state, flags):
    """Plan the step that brakes every joint instead; returns `flags` with what that adds."""
    fill_values(state.goal, np.nan)
    return flags | _step(state, state.goal, state.next_q, state.next_v)


@compiled
def _extend_path(state):
    """Make the planned step the newest of the path, and the mean of the path the planned command."""
    copy_values(state.path_q, state.next_q)
    copy_values(state.path_v, state.next_v)
    state.newest[0] = (state.newest[0] + 1) % state.path.shape[0]
    copy_values(state.path[state.newest[0]], state.next_q)
    smooth(state.path, state.newest[0], state.smoothing, state.next_q)
    for j in range(state.next_q.shape[0]):
        state.next_v[j] = (state.next_q[j] - state.command_q[j]) / state.period_s
        state.next_a[j] = (state.next_v[j] - state.command_v[j]) / state.period_s


@compiled
def _commit(state):
    """Make the planned command the command, if it may go on the wire; else brake, and if that may not either, keep."""
    is_refused = not _is_safe(state)
    if is_refused:
        _resume_path(state)
        _brake(state, 0)
        _extend_path(state)
    note_late(state.safety, COMMAND_REFUSED, is_refused)
    if not is_refused or _is_safe(state):
        copy_values(state.command_q, state.next_q)
        copy_values(state.command_v, state.next_v)
        copy_values(state.command_a, state.next_a)
    else:
        copy_values(state.path_q, state.command_q)
        fill_values(state.path_v, 0.0)
        _fill_path(state, state.command_q)
        fill_values(state.command_v, 0.0)
        fill_values(state.command_a, 0.0)
    return REFUSED if is_refused else 0


@compiled
def _resume_path(state):
    """A path, as if at constant acceleration until now, whose mean is the last command: what it was can not be trusted.

    Of its n steps, x from the middle: speed v + a x, place q + v x + a (x (x + 1) - (n^2 - 1) / 12) / 2. From there,
    braking changes the acceleration of the mean by at most (|a| + a_max) / n in a step, which the jerk allows.
    """
    size, dt = state.path.shape[0], state.period_s
    for j in range(state.path_q.shape[0]):
        n, q, v, a = state.smoothing[j], state.command_q[j], state.command_v[j] * dt, state.command_a[j] * dt * dt
        half = (n - 1.0) / 2.0
        for k in range(size):
            x = half - k
            state.path[(state.newest[0] - k) % size, j] = q + v * x + a * (x * (x + 1.0) - (n * n - 1.0) / 12.0) / 2.0
        state.path_q[j] = state.path[state.newest[0], j]
        state.path_v[j] = (v + a * half) / dt


@compiled
def _is_safe(state):
    """Whether the planned command may go on the wire: finite, and from the last ones inside every limit but workspace.

    From outside the range it may not get further out.
    """
    limits, dt = state.limits, state.period_s
    for j in range(state.next_q.shape[0]):
        q, last_q = state.next_q[j], state.command_q[j]
        if not math.isfinite(q):
            return False
        if math.isnan(last_q):
            continue
        if not min(limits.q_min[j], last_q) <= q <= max(limits.q_max[j], last_q):
            return False
        if not abs(q - last_q) <= limits.v_max[j] * dt * (1.0 + ROUNDING) + ROUNDING:
            return False
        if not abs(state.next_a[j]) <= limits.a_max[j] * (1.0 + ROUNDING) + ROUNDING / dt:
            return False
        if not abs(state.next_a[j] - state.command_a[j]) <= limits.j_max[j] * dt * (1.0 + ROUNDING) + ROUNDING / dt:
            return False
    return True


@compiled
def _count(counters, flags):
    counters.ticks[0] += 1
    counters.held[0] += 1 if flags & HELD else 0
    counters.limited[0] += 1 if flags & (POSITION | VELOCITY | ACCELERATION) else 0
    counters.refused[0] += 1 if flags & REFUSED else 0


@compiled
def _write_record(state, now_ns, in_sight, chunk_id, t0_ns, row, fraction, flags):
    record = state.record[0]
    record.t_ns = now_ns
    record.chunk_id = chunk_id
    record.row = row
    record.fraction = fraction
    record.age_ns = now_ns - t0_ns if chunk_id != EMPTY else 0
    record.flags = flags
    record.level = state.safety.level[0]
    record.faults = fault_bits(state.safety)
    record.number = state.counters.ticks[0] - 1
    record.in_sight = in_sight
    record.seen = state.safety.seen[0]
    record.frame_ns = state.safety.frame_ns[0]


def flag_names(flags: int) -> list[str]:
    """The names of the flags that are set."""
    return [name for flag, name in FLAG_NAMES.items() if flags & flag]
