"""What came over the wire, judged: goals outside the limits, and when they came. Shares no code with what it judges.

G goals, J joints, T ticks. Goals come in steps, as the servos got them. A step is 1.5 mrad, which is much of what a
limit allows per period. So speed and acceleration are differences over strides of n periods too, where a step is
little; and for jerk it is asked whether any path inside all limits rounds to these goals.

A loop that never makes up for a deadline it missed may send a late goal, at once the one whose period has not passed
yet, and then each at its own deadline: n goals after any one take at least n - 2 periods.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.packets import RAD_PER_STEP
from onbeat.drivers.feetech.tables import CENTRE_STEP

STRIDES = (1, 2, 4, 8, 16)
WINDOW, WINDOW_STEP = 256, 192  # goals that a path has to explain at once, and from one such window to the next
PAUSE_NS = 100_000_000  # between two goals: a run has ended, and the next one begins where the arm is
ROUNDING_STEPS = 0.5 + 1e-6
DECIDED = {0: True, 2: False}  # scipy.optimize.milp: a path was found, there is none; anything else tells nothing
WORKSPACE_SLACK_M = 0.002  # what gets out between the poses that the runtime looks at: docs/decisions/0021
REPORTED = (0, 50, 99, 100)  # percentiles
BURSTS = (3, 4, 8, 16)  # goals that come after one: what comes at once, and what comes too fast for a while
STILL_STEPS = 1  # a command that stands half-way between two steps may be rounded to either


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Per joint (J,), rad and s; period_s: of the loop that sent the goals. tool_low_m, tool_high_m: x, y, z of the box
    that the tool must not leave; empty for none."""

    q_min: NDArray[np.float64]
    q_max: NDArray[np.float64]
    v_max: NDArray[np.float64]
    a_max: NDArray[np.float64]
    j_max: NDArray[np.float64]
    period_s: float
    tool_low_m: tuple[float, ...] = ()
    tool_high_m: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Violations:
    """How often a limit was broken by more than rounding to steps explains.

    position, workspace: goals. velocity, acceleration: differences. jerk: windows of a joint's goals, out of `windows`;
    undecided: those of which the solver could say neither that a path explains them nor that none does.
    """

    position: int = 0
    velocity: int = 0
    acceleration: int = 0
    jerk: int = 0
    workspace: int = 0
    undecided: int = 0
    windows: int = 0

    def __add__(self, other: "Violations") -> "Violations":
        return Violations(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        return self.position + self.velocity + self.acceleration + self.jerk + self.workspace


def runs(goals: NDArray[np.void]) -> list[NDArray[np.void]]:
    """The goals of each run: those without a long pause between them."""
    return np.split(goals, np.flatnonzero(np.diff(goals["t_ns"]) > PAUSE_NS) + 1)


def count_violations(goals: NDArray[np.void], limits: WireLimits) -> Violations:
    """Of all runs on a wire, each judged by itself. goals: of records.GOAL_RECORD; of each run, the first is that of
    torque going on, then there is one per tick."""
    found = Violations()
    for run in runs(goals):
        found += Violations(velocity=_starts_too_fast(run[:2], limits))
        found += judge_run(run["goal_steps"][1:].astype(np.int64), limits)
    return found


def _starts_too_fast(first: NDArray[np.void], limits: WireLimits) -> bool:
    """Whether a run begins its path, where the arm is, further from where its torque went on than it may get meanwhile.

    An arm that was free sags a little until its servos hold it: no motion of a path, and not at a period's distance.
    """
    way_rad = np.abs(np.diff(first["goal_steps"].astype(np.int64), axis=0)) * RAD_PER_STEP
    return bool((way_rad > np.diff(first["t_ns"])[:, None] * 1e-9 * limits.v_max + RAD_PER_STEP).any())


def judge_run(steps: NDArray[np.int64], limits: WireLimits) -> Violations:
    """Of goals (G, J) that followed each other, one per period."""
    q: NDArray[np.float64] = (steps - CENTRE_STEP) * np.float64(RAD_PER_STEP)
    outside = (q < limits.q_min - RAD_PER_STEP) | (q > limits.q_max + RAD_PER_STEP)
    too_fast, too_hard = _differences(q, 1, limits.v_max, limits), _differences(q, 2, limits.a_max, limits)
    answers = list(_ask_windows(steps, limits, np.concatenate([too_fast, too_hard])))
    return Violations(
        position=int(np.count_nonzero(outside.any(axis=1))),
        velocity=len(too_fast),
        acceleration=len(too_hard),
        jerk=answers.count(False),
        workspace=_count_outside(q, limits),
        undecided=answers.count(None),
        windows=len(answers),
    )


def _differences(
    q: NDArray[np.float64], order: int, bound: NDArray[np.float64], limits: WireLimits
) -> NDArray[np.int64]:
    """Where differences of that order begin that no motion inside the bound explains, over all strides.

    Each goal is off by half a step at most. A difference of order k has binomial weights that sum to 2**k, so rounding
    adds at most 2**(k - 1) steps.
    """
    found = [np.zeros(0, np.int64)]
    for stride in STRIDES:
        difference = q
        for _ in range(order):
            difference = difference[stride:] - difference[:-stride]
        allowed = bound * (stride * limits.period_s) ** order + RAD_PER_STEP * 2.0 ** (order - 1) * (1.0 + 1e-9)
        found.append(np.flatnonzero((np.abs(difference) > allowed).any(axis=1)))
    return np.concatenate(found)


def _ask_windows(steps: NDArray[np.int64], limits: WireLimits, known: NDArray[np.int64]) -> Iterator[bool | None]:
    """Whether each window of each joint's goals `is_explained`; not those that hold a place of `known`."""
    for start in range(0, max(1, len(steps) - (WINDOW - WINDOW_STEP)), WINDOW_STEP):
        window = steps[start : start + WINDOW]
        if not np.any((known >= start) & (known < start + WINDOW)):
            bounds = np.stack([limits.v_max, limits.a_max, limits.j_max], axis=1)
            yield from (is_explained(*joint, limits.period_s) for joint in zip(window.T, bounds, strict=True))


def is_explained(goals: NDArray[np.int64], bounds: NDArray[np.float64], period_s: float) -> bool | None:
    """Whether a path inside the bounds (v_max, a_max, j_max) rounds to goals (G,) of one joint, in steps.

    None when the solver does not know: it ran out of time or of digits.

    That is, some x with |x - goals| <= half a step whose first, second and third differences are inside the bounds:
    linear constraints, of which it is asked whether they contradict each other. Where they do, a limit was broken for
    certain; where they do not, the goals cannot tell.
    """
    if len(goals) <= 3 or np.ptp(goals) == 0:
        return True
    optimize, sparse = importlib.import_module("scipy.optimize"), importlib.import_module("scipy.sparse")
    difference, rows, most = sparse.eye(len(goals), format="csr"), [], []
    for order, bound in enumerate(bounds, start=1):
        difference = difference[1:] - difference[:-1]
        rows.append(difference)
        most.append(np.full(difference.shape[0], bound * period_s**order / RAD_PER_STEP))
    inside = np.concatenate(most)
    way = goals - goals[0]
    found: Any = optimize.milp(  # with nothing to minimise and no whole numbers, what decides whether any x will do
        np.zeros(len(goals)),
        bounds=optimize.Bounds(way - ROUNDING_STEPS, way + ROUNDING_STEPS),
        constraints=optimize.LinearConstraint(sparse.vstack(rows), -inside, inside),
    )
    return DECIDED.get(found.status)


def _count_outside(q: NDArray[np.float64], limits: WireLimits) -> int:
    """Goals (G, J) that take the tool further out of its box than rounding explains, and than every goal before."""
    if not limits.tool_low_m or len(q) == 0:
        return 0
    place_m, lever_m = importlib.import_module("onbeat.drivers.twin.reach").tool_reach(q)
    excess_m = np.maximum(limits.tool_low_m - place_m, place_m - limits.tool_high_m).max(axis=1)
    rounding_m = lever_m * ROUNDING_STEPS * RAD_PER_STEP
    allowed_m = np.maximum(0.0, np.minimum.accumulate(excess_m + rounding_m))  # an arm that fell outside may come back
    return int(np.count_nonzero(excess_m - rounding_m > allowed_m + WORKSPACE_SLACK_M))


def moved(steps: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which joints (J,) did not stand still over goals (G, J)."""
    return np.ptp(steps, axis=0) > STILL_STEPS


def exceeded(steps: NDArray[np.int64], v_max: NDArray[np.float64], limits: WireLimits) -> NDArray[np.bool_]:
    """Which joints (J,) were faster over goals (G, J) than v_max (J,) and rounding explain."""
    q = steps * np.float64(RAD_PER_STEP)
    return np.array([len(_differences(q[:, j : j + 1], 1, v_max[j : j + 1], limits)) > 0 for j in range(q.shape[1])])


@dataclass(frozen=True, slots=True)
class TickTimes:
    """Both ends of a wire. delay_ms: from sent to arrived. sent_ms, arrived_ms: between goals. All: of REPORTED.

    missing: periods between the first goal and the last for which none came. bursts: goals after which others came
    sooner than a loop sends them that makes up for nothing.
    """

    goals: int
    ticks: int
    delay_ms: tuple[float, ...] = ()
    sent_ms: tuple[float, ...] = ()
    arrived_ms: tuple[float, ...] = ()
    missing: int = 0
    bursts: int = 0
    problem: str = ""


def compare_times(
    goals: NDArray[np.void], sent_ns: NDArray[np.int64], sent_rad: NDArray[np.float64], period_s: float
) -> TickTimes:
    """Goal by goal, when one end says that it sent and the other that it came; all on the monotonic clock.

    goals: of records.GOAL_RECORD, one per tick. sent_ns (T,), sent_rad (T, J): the ticks, each with the last moment
    before its goals left. problem: a burst, or the first thing in which both disagree; for the p99 of the times between
    goals, by a period or more.
    """
    if len(goals) != len(sent_ns):
        return TickTimes(len(goals), len(sent_ns), problem=f"{len(goals)} goals came of {len(sent_ns)} that were sent")
    delay_ns, times = goals["t_ns"] - sent_ns, (sent_ns, goals["t_ns"])
    delay, sent, arrived = (_percentiles(ns) for ns in (delay_ns, *map(np.diff, times)))
    is_other = np.abs(goals["goal_steps"] - CENTRE_STEP - sent_rad / RAD_PER_STEP) > ROUNDING_STEPS
    bursts, problem = count_bursts(goals["t_ns"], sent_ns, period_s), ""
    if is_other.any():
        problem = f"goal {np.flatnonzero(is_other.any(axis=1))[0]} came other than it was sent, or not in its turn"
    elif delay_ns.min(initial=0) < 0:
        problem = f"a goal came {-delay_ns.min() / 1e6:.3f} ms before it was sent"
    elif bursts:
        problem = f"after {bursts} goals others came in a burst: deadlines that were missed were made up for"
    elif abs(arrived[2] - sent[2]) > period_s * 1e3:
        problem = f"between goals, p99: {arrived[2]} ms on the wire, {sent[2]} ms in the loop"
    missing = count_missing(goals["t_ns"], period_s)
    return TickTimes(len(goals), len(sent_ns), delay, sent, arrived, missing, bursts, problem)


def count_missing(t_ns: NDArray[np.int64], period_s: float) -> int:
    """Periods between the first goal and the last for which none came."""
    return round(float(t_ns[-1] - t_ns[0]) * 1e-9 / period_s) + 1 - len(t_ns) if len(t_ns) else 0


def count_bursts(t_ns: NDArray[np.int64], sent_ns: NDArray[np.int64], period_s: float) -> int:
    """Goals after which n others came within less than n - 2 periods, for an n of BURSTS.

    From when a goal was sent: one that came late seems closer to the next ones than it is.
    """
    is_burst = np.zeros(len(t_ns), np.bool_)
    for n in BURSTS:
        is_burst[:-n] |= t_ns[n:] - sent_ns[:-n] < (n - 2) * period_s * 1e9
    return int(np.count_nonzero(is_burst))


def _percentiles(ns: NDArray[np.int64]) -> tuple[float, ...]:
    """REPORTED, in ms."""
    return tuple((np.percentile(ns, REPORTED) / 1e6).round(3).tolist()) if len(ns) else (0.0,) * len(REPORTED)
