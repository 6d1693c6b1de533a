"""The judge of the wire must see what breaks a limit, and must not see what only rounding makes."""

from dataclasses import astuple, replace
from types import SimpleNamespace

import numpy as np
import pytest

from onbeat.drivers.feetech.packets import RAD_PER_STEP
from onbeat.drivers.twin.judge import (
    Violations,
    WireLimits,
    compare_times,
    count_violations,
    is_explained,
    judge_run,
    runs,
)
from onbeat.drivers.twin.records import GOAL_RECORD
from onbeat.kernels.limit import limit, smooth, smoothing_ticks

DT = 0.005
BOUNDS = [np.array([b]) for b in (-1.5, 1.5, 3.0, 20.0, 1000.0)]
LIMITS = WireLimits(*(np.full(6, b[0]) for b in BOUNDS), period_s=DT)


def steps_of(q: np.ndarray) -> np.ndarray:
    """One joint's path (G,) as the steps of six."""
    return np.repeat(2048 + np.rint(q / RAD_PER_STEP).astype(int)[:, None], 6, axis=1)


def legal_path(seed: int, jerk: float = 1000.0, reach: float = 1.6) -> np.ndarray:
    """Random targets through the limits and the smoothing, as fast as both permit."""
    rng, ticks = np.random.default_rng(seed), smoothing_ticks(BOUNDS[3], np.array([jerk]), DT)
    q, v, out, target = np.zeros((4, 1))
    ring, path = np.zeros((int(ticks[0]), 1)), []
    for k in range(900):
        if k % 90 == 0:
            target = rng.uniform(-reach, reach, 1)
        limit(q, v, target, *BOUNDS[:4], DT, q, v)
        ring[k % len(ring)] = q
        smooth(ring, k % len(ring), ticks, out)
        path.append(out[0])
    return np.array(path)


def record(steps: np.ndarray, t_ns: np.ndarray) -> np.ndarray:
    goals = np.zeros(len(steps), GOAL_RECORD)
    goals["goal_steps"], goals["t_ns"] = steps, t_ns
    return goals


@pytest.mark.parametrize("seed", range(5))
def test_what_is_inside_the_limits_is_not_accused(seed: int):
    assert judge_run(steps_of(legal_path(seed)), LIMITS).total == 0


@pytest.mark.parametrize(
    ("name", "scale"), [("position", 1.05), ("velocity", 1.25), ("acceleration", 1.25), ("jerk", 1.5)]
)
def test_a_path_that_takes_more_is_caught(name: str, scale: float):
    """The limits of the judge are lower by that factor than those of the path."""
    index = ("position", "velocity", "acceleration", "jerk").index(name)
    bounds = [*astuple(LIMITS)[:5]]
    if name == "position":
        bounds[0], bounds[1] = bounds[0] / scale, bounds[1] / scale
    else:
        bounds[index + 1] = bounds[index + 1] / scale
    found = judge_run(steps_of(legal_path(0)), WireLimits(*bounds, period_s=DT))
    assert getattr(found, name) > 0
    assert found.total == getattr(found, name)


@pytest.mark.parametrize("seed", range(5))
def test_a_seventh_more_jerk_is_caught_in_ten_short_moves(seed: int):
    """Moves of less than 0.4 rad go from full acceleration to full braking. Seven steps of smoothing, not eight."""
    path = legal_path(seed, jerk=1150.0, reach=0.2)
    assert 1.1 < np.abs(np.diff(path, n=3)).max() / DT**3 / 1000.0 < 1.15
    steps = steps_of(path)[:, 0]
    bounds = np.array([3.0, 20.0, 1000.0])
    parts = [steps[k : k + 256] for k in range(0, 800, 192)]
    assert not all(is_explained(part, bounds, DT) for part in parts)


def test_goals_that_one_path_explains_and_goals_that_none_does():
    bounds = np.array([3.0, 20.0, 1000.0])
    assert is_explained(np.array([0, 0, 1, 1, 1, 1]), bounds, DT)
    assert not is_explained(np.array([0, 0, 2, 2, 2, 2]), bounds, DT)
    assert is_explained(np.array([5, 5, 5, 5]), bounds, DT)
    assert is_explained(np.array([0, 900]), bounds, DT)  # too few to have a jerk


@pytest.mark.parametrize("status", [1, 3, 4])
def test_a_solver_that_cannot_tell_is_told_and_counted(status: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("scipy.optimize.milp", lambda *_, **__: SimpleNamespace(status=status))
    assert is_explained(np.array([0, 0, 2, 2, 2, 2]), np.array([3.0, 20.0, 1000.0]), DT) is None
    found = judge_run(steps_of(legal_path(0)), LIMITS)
    assert found.undecided == found.windows == 30
    assert found.total == 0


def test_a_jump_is_caught_by_speed_and_acceleration():
    path = legal_path(1) * 0.5
    path[300:] += 0.1
    found = judge_run(steps_of(path), LIMITS)
    assert found.position == 0
    assert min(found.velocity, found.acceleration) > 0


class TestWorkspace:
    """The twin's arm, whose tool at HOME is over the table; z of a box is set by where its tool is."""

    HOME = np.array([0.0, -0.85, 0.6, 1.2, 0.0, 0.4])

    def judged(self, lift_rad: np.ndarray, low_z_m: float) -> Violations:
        poses = self.HOME + np.outer(lift_rad, [0, 1, 0, 0, 0, 0])
        steps = 2048 + np.rint(poses / RAD_PER_STEP).astype(int)
        return judge_run(steps, replace(LIMITS, tool_low_m=(-1.0, -1.0, low_z_m), tool_high_m=(1.0, 1.0, 1.0)))

    def height_m(self, lift_rad: float) -> float:
        from onbeat.drivers.twin.reach import tool_reach

        return float(tool_reach(self.HOME[None] + [0, lift_rad, 0, 0, 0, 0])[0][0, 2])

    def test_the_tool_is_where_the_chain_of_the_runtime_says_too(self):
        from onbeat.drivers.twin.reach import tool_reach
        from onbeat.kernels.kinematics import tool_reference
        from onbeat.runtime.robots import load_robot

        poses = np.random.default_rng(3).uniform(-1.5, 1.5, (20, 6))
        box = load_robot("so101-twin").workspace()
        assert tool_reach(poses)[0] == pytest.approx(np.array([tool_reference(q, box) for q in poses]), abs=1e-6)

    def test_rounding_moves_the_tool_by_less_than_the_judge_allows(self):
        from onbeat.drivers.twin.reach import tool_reach

        poses = np.random.default_rng(4).uniform(-1.5, 1.5, (50, 6))
        (place_m, lever_m), (rounded_m, _) = tool_reach(poses), tool_reach(np.rint(poses / RAD_PER_STEP) * RAD_PER_STEP)
        moved_m = np.linalg.norm(place_m - rounded_m, axis=1)
        assert (moved_m <= lever_m * RAD_PER_STEP / 2).all()
        assert lever_m.max() * RAD_PER_STEP / 2 < 0.0015

    def test_inside_and_at_the_edge_nothing_is_wrong(self):
        lift = 0.1 * np.sin(np.linspace(0, 6, 400))
        assert self.judged(lift, self.height_m(0.1)).workspace == 0

    def test_four_millimetres_out_are_caught(self):
        lift = 0.1 * np.sin(np.linspace(0, 6, 400))
        found = self.judged(lift, self.height_m(0.1) + 0.004)
        assert found.workspace > 0
        assert found.total == found.workspace

    def test_an_arm_that_fell_out_may_come_back_and_no_further_out(self):
        edge = self.height_m(0.0)
        back = np.linspace(0.2, 0.0, 100)
        assert self.judged(back, edge).workspace == 0
        assert self.judged(np.concatenate([back[:50], back[49::-1] + 0.02]), edge).workspace > 0

    def test_no_box_is_no_limit(self):
        assert judge_run(np.full((9, 6), 2048), LIMITS).workspace == 0


class TestTimes:
    """Ticks every 5 ms whose goals take 0.1 to 0.2 ms to come."""

    def ends(self, ticks: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        sent_ns, rad = np.arange(ticks) * 5_000_000 + 10**9, np.cumsum(rng.uniform(0, 0.01, (ticks, 6)), axis=0)
        steps = 2048 + np.rint(rad / RAD_PER_STEP).astype(int)
        return record(steps, sent_ns + rng.integers(100_000, 200_000, ticks)), sent_ns, rad

    def test_both_ends_agree(self):
        found = compare_times(*self.ends(), DT)
        assert found.problem == ""
        assert (found.goals, found.ticks) == (400, 400)
        assert 0.1 <= found.delay_ms[0] <= found.delay_ms[1] <= found.delay_ms[-1] <= 0.2
        assert found.sent_ms == (5.0, 5.0, 5.0, 5.0)

    def test_a_goal_that_never_came(self):
        goals, sent_ns, rad = self.ends()
        assert "399 goals came of 400" in compare_times(np.delete(goals, 7), sent_ns, rad, DT).problem

    def test_a_goal_that_nobody_sent(self):
        goals, sent_ns, rad = self.ends()
        assert "400 goals came of 399" in compare_times(goals, sent_ns[1:], rad[1:], DT).problem

    def test_two_goals_in_the_wrong_order(self):
        goals, sent_ns, rad = self.ends()
        goals["goal_steps"][[30, 31]] = goals["goal_steps"][[31, 30]]
        assert "goal 30 came other than it was sent" in compare_times(goals, sent_ns, rad, DT).problem

    def test_another_value_by_one_step(self):
        goals, sent_ns, rad = self.ends()
        goals["goal_steps"][12, 3] += 1
        assert "goal 12" in compare_times(goals, sent_ns, rad, DT).problem

    def test_a_goal_that_came_before_it_was_sent(self):
        goals, sent_ns, rad = self.ends()
        goals["t_ns"][5] = sent_ns[5] - 1000
        assert "0.001 ms before it was sent" in compare_times(goals, sent_ns, rad, DT).problem

    def test_a_runtime_that_reports_evener_times_than_the_wire_saw(self):
        goals, sent_ns, rad = self.ends()
        goals["t_ns"][::20] += 6_000_000
        assert "between goals, p99" in compare_times(goals, sent_ns, rad, DT).problem

    def late(self, *late_ms: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ticks from number 100 on are late by these times, and their goals with them."""
        goals, sent_ns, rad = self.ends()
        late_ns = np.zeros(len(sent_ns), np.int64)
        late_ns[100 : 100 + len(late_ms)] = np.array(late_ms) * 1e6
        goals["t_ns"] += late_ns
        return goals, sent_ns + late_ns, rad

    def test_deadlines_that_were_missed_and_dropped(self):
        goals, sent_ns, rad = self.ends()
        kept = np.delete(np.arange(400), range(100, 107))
        found = compare_times(goals[kept], sent_ns[kept], rad[kept], DT)
        assert (found.missing, found.bursts, found.problem) == (7, 0, "")

    def test_a_late_goal_and_the_one_of_the_running_period_at_once(self):
        found = compare_times(*self.late(9.0, 5.0, 0.9), DT)
        assert (found.missing, found.bursts, found.problem) == (0, 0, "")

    @pytest.mark.parametrize("missed", [3, 7, 40])
    def test_missed_deadlines_that_are_made_up_for_at_once(self, missed: int):
        found = compare_times(*self.late(*(5.0 * (missed - k) + 0.5 * k for k in range(missed + 1))), DT)
        assert found.missing == 0
        assert "in a burst" in found.problem

    def test_and_at_twice_the_pace(self):
        found = compare_times(*self.late(*(50.0 - 2.5 * k for k in range(20))), DT)
        assert "in a burst" in found.problem

    def test_goals_that_the_far_end_took_late_are_no_burst(self):
        goals, sent_ns, rad = self.ends()
        goals["t_ns"][200:210] = goals["t_ns"][210] - 1000
        found = compare_times(goals, sent_ns, rad, DT)
        assert (found.missing, found.bursts, found.problem) == (0, 0, "")

    def test_nothing_was_sent(self):
        nothing = np.zeros((0, 6))
        found = compare_times(record(nothing, np.zeros(0)), np.zeros(0, np.int64), nothing, DT)
        assert (found.goals, found.problem) == (0, "")


def test_runs_are_judged_by_themselves():
    path = np.concatenate([np.zeros(20), np.full(20, 1.0)])
    t_ns = np.arange(40) * 5_000_000
    assert count_violations(record(steps_of(path), t_ns), LIMITS).total > 0
    t_ns[20:] += 500_000_000
    goals = record(steps_of(path), t_ns)
    assert [len(run) for run in runs(goals)] == [20, 20]
    assert count_violations(goals, LIMITS).total == 0


class TestStarts:
    """An arm at rest, whose torque goes on 15 ms before the path begins."""

    def started(self, sag_steps: int) -> Violations:
        steps, t_ns = np.full((50, 6), 2048), np.arange(50) * 5_000_000
        steps[0] -= sag_steps
        t_ns[1:] += 10_000_000
        return count_violations(record(steps, t_ns), LIMITS)

    @pytest.mark.parametrize("sag_steps", [0, 2, 6, -6])
    def test_a_free_arm_may_sag_until_its_servos_hold_it(self, sag_steps: int):
        assert self.started(sag_steps).total == 0

    @pytest.mark.parametrize("sag_steps", [40, -40])
    def test_it_may_not_jump(self, sag_steps: int):
        assert self.started(sag_steps).velocity == 1

    def test_the_second_goal_belongs_to_the_path(self):
        steps = np.full((50, 6), 2048)
        steps[:2] -= 6
        assert count_violations(record(steps, np.arange(50) * 5_000_000), LIMITS).total > 0


def test_nothing_came_nothing_is_wrong():
    assert count_violations(record(np.zeros((0, 6)), np.zeros(0)), LIMITS).total == 0
