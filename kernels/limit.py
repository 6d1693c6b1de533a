"""One period's step of a commanded joint towards a target, inside position, velocity, acceleration and jerk limits.

Everything is discrete: v is the difference of two commands over the period dt, and the largest change of v in a
period is h = a_max * dt. Coming to rest from a step at u takes the steps u, u - h, u - 2h, ..., so u may be commanded
only if

    dt * (u + (u - h) + (u - 2h) + ...) <= gap,    for n = floor(u / h):    dt * ((n+1) u - h n (n+1) / 2) <= gap.

`approach_speed` is the largest such u. Keeping below it towards the target, at every step, is what ends there without
overshoot; and as every target is first cut to the position range, it is also what leaves room to stop inside the range,
whatever target comes next: docs/decisions/0012 has the argument and the figures.

The jerk is limited afterwards: the command is the mean of the last n steps of that path. A mean of positions, speeds or
accelerations that are inside their limits is inside them too, a mean of a path that does not overshoot does not, and
accelerations of +-a_max cannot change faster than 2 a_max / (n dt). The price is a lag of (n - 1) / 2 periods:
docs/decisions/0021.
"""

import math

import numpy as np
from numpy.typing import NDArray

from onbeat.kernels.compiled import compiled

Joints = NDArray[np.float64]

HELD = 1  # no target was due, at least one joint was brought to rest
POSITION = 2  # a target lay outside the position range
VELOCITY = 4  # the step to the target was cut to v_max
ACCELERATION = 8  # the step was cut by a_max, now or for the braking that follows


def limit_reference(
    q: Joints, v: Joints, target: Joints, q_min: Joints, q_max: Joints, v_max: Joints, a_max: Joints, dt: float
) -> tuple[Joints, Joints, int]:
    """Return the next command (q, v) and the flags of what shaped it.

    q, v: (J,) rad and rad/s, the last command and its step over dt (s). target: (J,) rad; NaN brings the joint to
    rest. A command from inside the limits stays inside all of them. From outside the position range it never moves
    further out; from a speed that cannot stop in time, the position range wins over the acceleration.
    """
    held = np.isnan(target)
    goal = np.clip(target, q_min, q_max)
    h = a_max * dt
    wanted = np.where(held, 0.0, (goal - q) / dt)
    approach = [approach_speed_reference(abs(w) * dt, s, dt) for w, s in zip(wanted, h, strict=True)]
    allowed = np.sign(wanted) * np.minimum(approach, v_max)
    reached = q + np.clip(allowed, v - h, v + h) * dt
    q_next = np.clip(reached, np.minimum(q, q_min), np.maximum(q, q_max))
    v_next = (q_next - q) / dt
    flags = HELD * held.any() | POSITION * bool((goal != target)[~held].any())
    flags |= VELOCITY * bool((np.abs(wanted) > v_max)[~held].any())
    flags |= ACCELERATION * bool((np.abs(v_next - np.clip(wanted, -v_max, v_max)) > TOLERANCE)[~held].any())
    return q_next, v_next, int(flags)


TOLERANCE = 1e-9  # rad/s: rounding of positions of a few rad over periods of 1 ms and more


def approach_speed_reference(gap: float, h: float, dt: float) -> float:
    """The largest first step (rad/s) from which the steps that follow, each slower by h, end within `gap` (rad)."""
    whole_steps = 0
    while dt * h * (whole_steps + 1) * (whole_steps + 2) / 2 <= gap:
        whole_steps += 1
    return max(0.0, (gap / dt + h * whole_steps * (whole_steps + 1) / 2) / (whole_steps + 1))


@compiled
def approach_speed(gap, h, dt):
    """`approach_speed_reference` with the number of braking steps in closed form: n (n+1) / 2 <= gap / (dt h)."""
    if gap <= 0.0:
        return 0.0
    n = math.floor((math.sqrt(1.0 + 8.0 * gap / (dt * h)) - 1.0) / 2.0)
    return (gap / dt + h * n * (n + 1.0) / 2.0) / (n + 1.0)


@compiled
def limit(q, v, target, q_min, q_max, v_max, a_max, dt, out_q, out_v):
    """The compiled variant of `limit_reference`: writes (out_q, out_v), which may be (q, v), and returns the flags."""
    flags = 0
    for j in range(q.shape[0]):
        out_q[j], out_v[j], shaped = _limit_joint(q[j], v[j], target[j], q_min[j], q_max[j], v_max[j], a_max[j], dt)
        flags |= shaped
    return flags


@compiled
def _limit_joint(q, v, target, q_min, q_max, v_max, a_max, dt):
    h = a_max * dt
    wanted, flags = 0.0, HELD
    if not math.isnan(target):
        goal = min(max(target, q_min), q_max)
        wanted, flags = (goal - q) / dt, (POSITION if goal != target else 0)
    allowed = math.copysign(min(approach_speed(abs(wanted) * dt, h, dt), v_max), wanted)
    reached = q + min(max(allowed, v - h), v + h) * dt
    q_next = min(max(reached, min(q, q_min)), max(q, q_max))
    v_next = (q_next - q) / dt
    if flags != HELD:
        flags |= VELOCITY if abs(wanted) > v_max else 0
        flags |= ACCELERATION if abs(v_next - min(max(wanted, -v_max), v_max)) > TOLERANCE else 0
    return q_next, v_next, flags


@compiled
def braking_steps(v, h):
    """How many steps of v - h, v - 2h, ... are left before rest."""
    return math.floor(abs(v) / h)


@compiled
def braking_distance(v, h, dt, steps):
    """How far (rad, signed) the first `steps` of the steps v - h, v - 2h, ... lead, or all of fewer."""
    n = min(steps, braking_steps(v, h))
    return math.copysign(dt * (n * abs(v) - h * n * (n + 1.0) / 2.0), v)


def smoothing_ticks(a_max: Joints, j_max: Joints, dt: float) -> NDArray[np.int64]:
    """Over how many steps (J,) the path is averaged so that its jerk stays below j_max (J,), rad/s^3."""
    return np.maximum(1, np.ceil(2.0 * a_max / (j_max * dt) - TOLERANCE)).astype(np.int64)


def smooth_reference(path: NDArray[np.float64], ticks: NDArray[np.int64]) -> Joints:
    """The mean of the last ticks[j] steps of each joint. path: (N, J), newest last, N at least the largest of ticks."""
    return np.array([path[-n:, j].mean() for j, n in enumerate(ticks)])


@compiled
def smooth(path, newest, ticks, out):
    """The compiled variant of `smooth_reference` on a ring: path[newest] is the newest, newest - 1 the one before.

    Differences to the newest are averaged, so that a path at rest comes out exactly as it is.
    """
    size = path.shape[0]
    for j in range(ticks.shape[0]):
        total = 0.0
        for k in range(1, ticks[j]):
            total += path[(newest - k) % size, j] - path[newest, j]
        out[j] = path[newest, j] + total / ticks[j]


def _limit_numba(q, v, target, q_min, q_max, v_max, a_max, dt):
    out_q, out_v = np.empty_like(q), np.empty_like(v)
    flags = limit(q, v, target, q_min, q_max, v_max, a_max, dt, out_q, out_v)
    return out_q, out_v, flags


VARIANTS = {"numpy": limit_reference, "numba": _limit_numba}
