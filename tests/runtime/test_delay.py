"""The delay counted in policy steps, its budget, and the bound that it must keep."""

import numpy as np
import pytest

from onbeat.runtime.delay import DelayBudget, bound_problem, executed_steps, leaves_gap
from onbeat.runtime.timeline import NEVER

PERIOD_NS = 100


class TestBudget:
    def test_is_the_margin_before_any_measurement(self):
        assert DelayBudget(margin_steps=1).steps() == 1

    def test_follows_the_slow_ones_and_forgets_them(self):
        budget = DelayBudget(margin_steps=1)
        for k in range(40):
            budget.add(3 if k % 10 == 0 else 1)
        assert (budget.measured(), budget.steps()) == (3, 4)
        for _ in range(64):
            budget.add(1)
        assert budget.steps() == 2

    def test_one_in_a_hundred_is_no_reason(self):
        budget = DelayBudget(margin_steps=0)
        for k in range(64):
            budget.add(9 if k == 30 else 2)
        assert budget.steps() == 2

    def test_is_a_step_that_was_counted_and_never_one_between_two(self):
        budget = DelayBudget(margin_steps=0)
        for steps in (1, 1, 5):
            budget.add(steps)
        assert budget.steps() == 5


@pytest.mark.parametrize(("progress_ns", "steps"), [(-1, 0), (0, 1), (99, 1), (100, 2), (250, 3), (-10_000, 0)])
def test_steps_are_rows_whose_time_the_ticks_have_reached(progress_ns: int, steps: int):
    assert executed_steps(progress_ns, 0, PERIOD_NS, now_ns=10**6) == steps


def test_before_any_tick_the_clock_counts():
    assert executed_steps(NEVER, 0, PERIOD_NS, now_ns=250) == 3


class TestBound:
    @pytest.mark.parametrize(
        ("delay", "horizon", "rows"), [(1, 0, 2), (8, 0, 16), (2, 14, 16), (3, 3, 16), (0, 16, 16)]
    )
    def test_holds(self, delay: int, horizon: int, rows: int):
        assert bound_problem(delay, horizon, rows) == ""

    @pytest.mark.parametrize(("delay", "horizon", "rows"), [(9, 0, 16), (2, 15, 16), (1, 0, 1), (17, 16, 16)])
    def test_a_gap_is_told_with_its_figures(self, delay: int, horizon: int, rows: int):
        text = bound_problem(delay, horizon, rows)
        assert leaves_gap(delay, horizon, rows)
        assert all(figure in text for figure in (f"d = {delay}", f"s = {max(horizon, delay)}", f"H = {rows}"))
        assert "infer faster" in text

    def test_a_horizon_shorter_than_the_delay_leaves_no_gap_but_is_told(self):
        assert not leaves_gap(4, 3, 16)
        assert "s = 3, but a chunk comes d = 4" in bound_problem(4, 3, 16)

    def test_is_exactly_the_inequality(self):
        for delay, horizon, rows in np.ndindex(12, 12, 12):
            holds = horizon == 0 or delay <= horizon
            holds = holds and max(horizon, delay) <= rows - delay
            assert (bound_problem(delay, horizon, rows) == "") == holds, (delay, horizon, rows)
