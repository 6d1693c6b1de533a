"""The delay d: how many policy steps the robot executes between an observation and its chunk, and whether that fits.

Counted and not timed: a chunk's delay is the number of its rows whose time the loop's ticks had reached when it came.
The budget of the next chunk is a high quantile of those, plus a margin.

    observation      rows 0, 1 and 2 were due to ticks before the chunk came: 3 steps
        ▼            ▼
        o────o────o──│─o────o
        0    1    2  │ 3
                   chunk

s is the execution horizon, the policy steps from one observation to the next, and H the rows of a chunk. Source of the
bound d <= s <= H - d: arXiv 2506.07339: a chunk comes before the next inference starts, and lasts until that one's.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.timeline import NEVER

QUANTILE = 0.95
WINDOW = 64  # chunks remembered: some ten seconds of a policy at 5 to 10 Hz


class DelayTooLong(OnbeatError):
    """Chunks take so long that their successors cannot follow them without a gap."""


@dataclass(slots=True)
class DelayBudget:
    """The delay d to plan with. margin_steps: on top of the quantile. Before any measurement d is the margin alone."""

    margin_steps: int
    counted: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, steps: int) -> None:
        """A chunk came after so many steps. Not for a cold inference, which says nothing of the next."""
        self.counted.append(steps)

    def measured(self) -> int:
        """The quantile alone; a step that was counted, never one between two."""
        return int(np.quantile(self.counted, QUANTILE, method="higher")) if self.counted else 0

    def steps(self) -> int:
        """The delay d."""
        return self.measured() + self.margin_steps


def executed_steps(progress_ns: int, t0_ns: int, period_ns: int, now_ns: int) -> int:
    """How many rows of a chunk that starts at t0_ns the robot has been past: by its ticks, by the clock before any.

    progress_ns: the time of the last tick, or timeline.NEVER.
    """
    return max(0, (now_ns if progress_ns == NEVER else progress_ns) - t0_ns + period_ns) // period_ns


def leaves_gap(delay: int, execute_steps: int, rows: int) -> bool:
    """Whether a chunk ends before the next can take over: s > H - d. execute_steps: s as asked for, 0 for s = d."""
    return max(execute_steps, delay) + delay > rows


def bound_problem(delay: int, execute_steps: int, rows: int) -> str:
    """What is wrong with d, s and H, as a text with the figures; empty when d <= s <= H - d.

    execute_steps: s as asked for, 0 for as often as inference can, which is every d steps.
    """
    if leaves_gap(delay, execute_steps, rows):
        return (
            f"a chunk comes d = {delay} policy steps after its observation, the next observation follows after "
            f"s = {max(execute_steps, delay)}, and a chunk has H = {rows} rows, so d <= s <= H - d does not hold and "
            "the robot will stop between chunks: infer faster, lower execute_steps or margin_steps, or use --mode sync"
        )
    if 0 < execute_steps < delay:
        return (
            f"execute_steps is s = {execute_steps}, but a chunk comes d = {delay} policy steps after its observation, "
            f"so d <= s does not hold and observations follow every {delay} steps: infer faster, or raise execute_steps"
        )
    return ""
