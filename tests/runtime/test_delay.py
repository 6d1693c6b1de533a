"""The delay counted in policy steps, its budget, and the bound that it must keep."""

import numpy as np
import pytest

from onbeat.runtime.delay import DelayBudget, bound_problem, elapsed_steps, executed_steps, leaves_gap, spaced_steps

PERIOD_NS = 100


class TestBudget:
    def test_is_that_of_the_margin_before_any_measurement(self):
        assert [DelayBudget(margin).steps() for margin in (0.0, 0.5, 1.0, 1.1)] == [1, 2, 2, 3]
        assert DelayBudget(1.0).measured() == 0

    @pytest.mark.parametrize(("margin", "came", "steps"), [(0.5, 0.2, 2), (0.5, 0.5, 2), (0.5, 0.6, 3), (1.0, 0.2, 3)])
    def test_a_part_of_a_step_is_a_margin(self, margin: float, came: float, steps: int):
        budget = DelayBudget(margin)
        budget.add(came)
        assert budget.steps() == steps
        assert budget.measured() == 2

    def test_covers_the_chunk_that_was_counted_whatever_the_margin(self):
        for came_ns in range(1, 400, 7):
            budget = DelayBudget(margin_steps=0.0)
            budget.add(elapsed_steps(came_ns, 0, PERIOD_NS))
            assert budget.steps() == budget.measured() == executed_steps(came_ns, 0, PERIOD_NS)

    def test_follows_the_slow_ones_and_forgets_them(self):
        budget = DelayBudget(margin_steps=0.5)
        for k in range(40):
            budget.add(2.4 if k % 10 == 0 else 0.4)
        assert (budget.measured(), budget.steps()) == (4, 4)
        for _ in range(64):
            budget.add(0.4)
        assert budget.steps() == 2

    def test_one_in_a_hundred_is_no_reason(self):
        budget = DelayBudget(margin_steps=0.0)
        for k in range(64):
            budget.add(9.0 if k == 30 else 1.0)
        assert budget.steps() == 2

    def test_is_one_that_was_counted_and_never_one_between_two(self):
        budget = DelayBudget(margin_steps=0.0)
        for steps in (0.1, 0.1, 4.0):
            budget.add(steps)
        assert budget.steps() == 5


@pytest.mark.parametrize(("ran_ns", "steps"), [(-10_000, 1), (0, 1), (1, 2), (99, 2), (100, 2), (101, 3), (250, 4)])
def test_steps_are_the_rows_that_are_past_and_the_next_to_come(ran_ns: int, steps: int):
    assert executed_steps(ran_ns, 0, PERIOD_NS) == steps
    assert executed_steps(ran_ns + 7, 7, PERIOD_NS) == steps


@pytest.mark.parametrize(("apart_ns", "steps"), [(0, 0), (49, 0), (50, 1), (101, 1), (149, 1), (990, 10), (1049, 10)])
def test_spacing_is_told_to_the_nearest_step(apart_ns: int, steps: int):
    assert spaced_steps(13, 13 + apart_ns, PERIOD_NS) == steps


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
        assert "s = 3, but a chunk takes over after d = 4" in bound_problem(4, 3, 16)

    @pytest.mark.parametrize(("horizon", "spaced", "is_told"), [(0, 9, False), (0, 10, True), (10, 2, True)])
    def test_s_is_what_was_asked_for_or_what_it_really_is_if_that_is_more(
        self, horizon: int, spaced: int, is_told: bool
    ):
        text = bound_problem(7, horizon, 16, spaced)
        assert leaves_gap(7, horizon, 16, spaced) == is_told
        assert ("s = 10" in text) == is_told
        assert ("take frames more often" in text) == (is_told and spaced > horizon)

    def test_is_exactly_the_inequality(self):
        for delay, horizon, rows in np.ndindex(12, 12, 12):
            holds = horizon == 0 or delay <= horizon
            holds = holds and max(horizon, delay) <= rows - delay
            assert (bound_problem(delay, horizon, rows) == "") == holds, (delay, horizon, rows)
