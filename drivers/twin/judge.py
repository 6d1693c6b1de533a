"""What came over the wire, judged: goals outside the limits, and when they came. Shares no code with what it judges.

G goals, J joints, in steps as the servos got them. A step is 1.5 mrad, which is much of what a limit allows per period;
so differences are taken over strides of n periods too, where a step is little.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.packets import RAD_PER_STEP
from onbeat.drivers.feetech.tables import CENTRE_STEP

STRIDES = (1, 2, 4, 8, 16)
PAUSE_NS = 100_000_000  # between two goals: a run has ended, and the next one begins where the arm is
REPEAT_SHARE = 0.5  # of a period: the same goals again within it are a retry


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Per joint (J,), rad and s; period_s: of the loop that sent the goals."""

    q_min: NDArray[np.float64]
    q_max: NDArray[np.float64]
    v_max: NDArray[np.float64]
    a_max: NDArray[np.float64]
    j_max: NDArray[np.float64]
    period_s: float


@dataclass(frozen=True, slots=True)
class Violations:
    """How many goals, or differences of goals, lay outside a limit by more than rounding to steps explains."""

    position: int = 0
    velocity: int = 0
    acceleration: int = 0
    jerk: int = 0

    def __add__(self, other: "Violations") -> "Violations":
        return Violations(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


def merge_retries(goals: NDArray[np.void], period_s: float) -> NDArray[np.void]:
    """Without the goals that only repeat the one before within a part of a period. goals: of records.GOAL_RECORD."""
    if len(goals) == 0:
        return goals
    is_same = (goals["goal_steps"][1:] == goals["goal_steps"][:-1]).all(axis=1)
    is_soon = np.diff(goals["t_ns"]) < REPEAT_SHARE * period_s * 1e9
    return goals[np.concatenate([[True], ~(is_same & is_soon)])]


def runs(goals: NDArray[np.void]) -> list[NDArray[np.void]]:
    """The goals of each run: those without a long pause between them."""
    return np.split(goals, np.flatnonzero(np.diff(goals["t_ns"]) > PAUSE_NS) + 1)


def count_violations(goals: NDArray[np.void], limits: WireLimits) -> Violations:
    """Of all runs on a wire, each judged by itself."""
    found = Violations()
    for run in runs(merge_retries(goals, limits.period_s)):
        found += judge_run(run["goal_steps"].astype(np.int64), limits)
    return found


def judge_run(steps: NDArray[np.int64], limits: WireLimits) -> Violations:
    """Of goals (G, J) that followed each other, one per period."""
    q: NDArray[np.float64] = (steps - CENTRE_STEP) * np.float64(RAD_PER_STEP)
    outside = (q < limits.q_min - RAD_PER_STEP) | (q > limits.q_max + RAD_PER_STEP)
    counts = [int(np.count_nonzero(outside.any(axis=1)))]
    for order, bound in ((1, limits.v_max), (2, limits.a_max), (3, limits.j_max)):
        counts.append(sum(_count(q, order, stride, bound, limits.period_s) for stride in STRIDES))
    return Violations(*counts)


def _count(q: NDArray[np.float64], order: int, stride: int, bound: NDArray[np.float64], period_s: float) -> int:
    """Differences of that order over a stride that no motion inside the bound explains.

    Each goal is off by half a step at most. A difference of order k has binomial weights that sum to 2**k, so rounding
    adds at most 2**(k - 1) steps.
    """
    difference = q
    for _ in range(order):
        difference = difference[stride:] - difference[:-stride]
    allowed = bound * (stride * period_s) ** order + RAD_PER_STEP * 2.0 ** (order - 1) * (1.0 + 1e-9)
    return int(np.count_nonzero((np.abs(difference) > allowed).any(axis=1)))
