"""The judge of the wire must see what breaks a limit, and must not see what only rounding makes."""

from dataclasses import astuple

import numpy as np
import pytest

from onbeat.drivers.feetech.packets import RAD_PER_STEP
from onbeat.drivers.twin.judge import Violations, WireLimits, count_violations, judge_run, merge_retries, runs
from onbeat.drivers.twin.records import GOAL_RECORD
from onbeat.kernels.limit import limit, smooth, smoothing_ticks

DT = 0.01
BOUNDS = [np.array([b]) for b in (-1.5, 1.5, 3.0, 20.0, 1000.0)]
LIMITS = WireLimits(*(np.full(6, b[0]) for b in BOUNDS), period_s=DT)


def steps_of(q: np.ndarray) -> np.ndarray:
    """One joint's path (G,) as the steps of six."""
    return np.repeat(2048 + np.rint(q / RAD_PER_STEP).astype(int)[:, None], 6, axis=1)


def legal_path(seed: int) -> np.ndarray:
    """Random targets through the limits and the smoothing, as fast as both permit."""
    rng, ticks = np.random.default_rng(seed), smoothing_ticks(BOUNDS[3], BOUNDS[4], DT)
    q, v, ring, out, path = np.zeros(1), np.zeros(1), np.zeros((int(ticks[0]), 1)), np.zeros(1), []
    for k in range(600):
        if k % 37 == 0:
            target = rng.uniform(-1.6, 1.6, 1)
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
    assert judge_run(steps_of(legal_path(seed)), LIMITS) == Violations()


@pytest.mark.parametrize(
    ("name", "scale"), [("position", 1.05), ("velocity", 1.25), ("acceleration", 1.25), ("jerk", 2.5)]
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


def test_a_jump_is_caught_in_every_order_but_position():
    path = legal_path(1) * 0.5
    path[300:] += 0.1
    found = judge_run(steps_of(path), LIMITS)
    assert found.position == 0
    assert min(found.velocity, found.acceleration, found.jerk) > 0


def test_a_retry_is_no_second_goal_and_rest_is_no_retry():
    t_ns = np.array([0, 10_000_000, 12_000_000, 20_000_000, 30_000_000])
    steps = steps_of(np.array([0.0, 0.01, 0.01, 0.02, 0.02]))
    assert merge_retries(record(steps, t_ns), DT)["t_ns"].tolist() == [0, 10_000_000, 20_000_000, 30_000_000]


def test_runs_are_judged_by_themselves():
    path = np.concatenate([np.zeros(20), np.full(20, 1.0)])
    t_ns = np.arange(40) * 10_000_000
    assert count_violations(record(steps_of(path), t_ns), LIMITS).total > 0
    t_ns[20:] += 500_000_000
    goals = record(steps_of(path), t_ns)
    assert [len(run) for run in runs(goals)] == [20, 20]
    assert count_violations(goals, LIMITS) == Violations()


def test_nothing_came_nothing_is_wrong():
    assert count_violations(record(np.zeros((0, 6)), np.zeros(0)), LIMITS) == Violations()
