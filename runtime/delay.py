"""The delay d: how many rows of a chunk the robot executes as something older had them, and whether that fits.

A chunk takes over at a policy step, so that nothing jumps: rows that are past when it comes, and the next to come, on
whose way the robot already is, are the old ones. By the loop's ticks and not by the clock alone, where those are ahead.
The budget of the next chunk is that of a high quantile of when they came, plus a margin: a part of a step is a margin
too, and a whole one would have every robot answer a step later.

    observation        rows 0 to 3 are the old ones: d = 4
        ▼
        o────o────o──│─o────N────N
        0    1    2  │ 3    4    5
                   chunk
                       ▲ seam

s is the execution horizon, the policy steps from one observation to the next, and H the rows of a chunk. Source of the
bound d <= s <= H - d: arXiv 2506.07339: a chunk comes before the next inference starts, and lasts until the next seam.
"""

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.timeline import find_next_row

QUANTILE = 0.95
SPACING_QUANTILE = 0.75  # what is rarer is an outage, which has faults of its own
WINDOW = 64  # chunks remembered: some ten seconds of a policy at 5 to 10 Hz


class DelayTooLong(OnbeatError):
    """Chunks take so long that their successors cannot follow them without a gap."""


@dataclass(slots=True)
class DelayBudget:
    """The delay d to plan with. margin_steps: on top of the quantile, a part of a policy step as a rule."""

    margin_steps: float
    came: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, steps: float) -> None:
        """A chunk came that many policy steps after its observation. Not for a cold inference: the next is not."""
        self.came.append(steps)

    def measured(self) -> int:
        """The d of the quantile alone; 0 before any measurement."""
        return rows_until(self._quantile()) if self.came else 0

    def steps(self) -> int:
        """The delay d."""
        return rows_until(self._quantile() + self.margin_steps)

    def _quantile(self) -> float:
        return float(np.quantile(list(self.came), QUANTILE, method="higher")) if self.came else 0.0


def rows_until(steps: float) -> int:
    """d of a chunk that comes so many policy steps after its observation."""
    return max(0, math.ceil(steps)) + 1


def quantile_steps(counted: Collection[int], share: float) -> int:
    """A quantile, and never one between two that were counted; 0 of none."""
    return int(np.quantile(list(counted), share, method="higher")) if counted else 0


def elapsed_steps(ran_until_ns: int, t0_ns: int, period_ns: int) -> float:
    """When a chunk comes, in policy steps after its row 0 was due."""
    return (ran_until_ns - t0_ns) / period_ns


def executed_steps(ran_until_ns: int, t0_ns: int, period_ns: int) -> int:
    """d of a chunk whose row 0 is due at t0_ns and that comes at `ran_until_ns`: its rows up to the next to come.

    The first row of its own has this number, unless more rows are locked or nothing is committed.
    """
    return int(find_next_row(t0_ns, period_ns, ran_until_ns)) + 1


def spaced_steps(before_ns: int, observed_ns: int, period_ns: int) -> int:
    """s between two observations, to the nearest step: stamps jitter, and half a period more leaves no gap.

    For a chunk's last row lasts for a whole one.
    """
    return (observed_ns - before_ns + period_ns // 2) // period_ns


def leaves_gap(delay: int, execute_steps: int, rows: int, spaced: int = 0) -> bool:
    """Whether a chunk ends before the next can take over: s > H - d. Arguments as for `bound_problem`."""
    return max(execute_steps, delay, spaced) + delay > rows


def bound_problem(delay: int, execute_steps: int, rows: int, spaced: int = 0) -> str:
    """What is wrong with d, s and H, as a text with the figures; empty when d <= s <= H - d.

    execute_steps: s as asked for, 0 for as often as inference can, which is every d steps. spaced: s as observations
    really follow each other, 0 where that is not known yet.
    """
    if leaves_gap(delay, execute_steps, rows, spaced):
        is_seldom = spaced > max(execute_steps, delay)
        return (
            f"a chunk takes over after d = {delay} policy steps, the next observation follows after "
            f"s = {max(execute_steps, delay, spaced)}, and a chunk has H = {rows} rows, so d <= s <= H - d does not "
            f"hold and the robot will stop between chunks: {'take frames more often, ' if is_seldom else ''}"
            "infer faster, lower execute_steps or margin_steps, or use --mode sync"
        )
    if 0 < execute_steps < delay:
        return (
            f"execute_steps is s = {execute_steps}, but a chunk takes over after d = {delay} policy steps, so d <= s "
            "does not hold: infer faster, lower margin_steps, or raise execute_steps"
        )
    return ""
