"""Limits judged from outside: by differencing the commands, never by what the code says of itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onbeat.kernels.limit import (
    ACCELERATION,
    HELD,
    POSITION,
    VARIANTS,
    VELOCITY,
    approach_speed,
    approach_speed_reference,
    braking_distance,
    limit,
    limit_reference,
    smooth,
    smooth_reference,
    smoothing_ticks,
)

DT = 0.01
Q_MIN, Q_MAX, V_MAX, A_MAX = -1.5, 2.0, 3.0, 20.0


def drive(targets, *, q=0.0, v=0.0, dt=DT, bounds=(Q_MIN, Q_MAX, V_MAX, A_MAX)):
    """The commands (T + 1,) that one joint gives for a list of targets, and the flags of each step."""
    limits = [np.array([b]) for b in bounds]
    q_now, v_now = np.array([q]), np.array([v])
    commands, flags = [q], []
    for target in targets:
        flags.append(limit(q_now, v_now, np.array([target]), *limits, dt, q_now, v_now))
        commands.append(q_now[0])
    return np.array(commands), flags


def assert_inside(commands, *, v0=0.0, dt=DT, bounds=(Q_MIN, Q_MAX, V_MAX, A_MAX)):
    """Position, speed and acceleration by differences of the commands; 1e-9 is their rounding over dt."""
    q_min, q_max, v_max, a_max = bounds
    speed = np.diff(commands, prepend=commands[0] - v0 * dt) / dt
    assert commands.min() >= q_min
    assert commands.max() <= q_max
    assert np.abs(speed).max() <= v_max * (1 + 1e-9) + 1e-9
    assert np.abs(np.diff(speed)).max(initial=0) <= a_max * dt * (1 + 1e-9) + 1e-9


class TestBadInput:
    def test_no_target_brings_the_joint_to_rest_and_keeps_it_there(self):
        commands, flags = drive([np.nan] * 40, v=1.0)
        assert_inside(commands, v0=1.0)
        assert commands[-1] == commands[-2]
        assert set(flags) == {HELD}

    @pytest.mark.parametrize(("target", "end"), [(np.inf, Q_MAX), (-np.inf, Q_MIN), (1e300, Q_MAX)])
    def test_an_absurd_target_ends_at_the_range(self, target: float, end: float):
        commands, flags = drive([target] * 300)
        assert_inside(commands)
        assert commands[-1] == pytest.approx(end, abs=1e-12)
        assert all(flag & POSITION for flag in flags)

    def test_a_joint_outside_its_range_never_moves_further_out(self):
        commands, _ = drive([Q_MAX + 1.0] * 5 + [0.0] * 5, q=Q_MAX + 0.2)
        assert (np.diff(commands) <= 0).all()
        assert commands[-1] < commands[0]

    def test_one_joint_without_a_target_leaves_the_others_alone(self):
        zero = np.zeros(2)
        bounds = [np.full(2, b) for b in (Q_MIN, Q_MAX, V_MAX, A_MAX)]
        q, _, flags = limit_reference(zero, zero, np.array([np.nan, 1.0]), *bounds, DT)
        assert q[0] == 0.0
        assert q[1] > 0.0
        assert flags & HELD


def test_a_near_target_is_reached_in_one_step_without_flags():
    commands, flags = drive([1e-4])
    assert commands[-1] == 1e-4
    assert flags == [0]


def test_a_far_target_is_approached_at_full_speed_and_hit_exactly():
    commands, flags = drive([1.9] * 200)
    assert_inside(commands)
    assert np.diff(commands).max() / DT == pytest.approx(V_MAX)
    assert commands.max() <= 1.9 + 1e-12
    assert commands[-1] == pytest.approx(1.9, abs=1e-12)
    assert flags[0] & ACCELERATION
    assert flags[0] & VELOCITY
    assert flags[-1] == 0


def test_arrival_takes_no_longer_than_the_limits_demand():
    """From rest to rest over D: D / v + v / a, plus two periods of discretisation."""
    commands, _ = drive([1.5] * 200)
    arrived = int(np.argmax(np.abs(commands - 1.5) < 1e-9))
    assert arrived * DT <= 1.5 / V_MAX + V_MAX / A_MAX + 2 * DT


@settings(max_examples=300, deadline=None)
@given(
    targets=st.lists(st.floats(-4, 4) | st.just(float("nan")), min_size=1, max_size=60),
    repeat=st.integers(1, 12),
    q=st.floats(Q_MIN, Q_MAX),
    v_max=st.floats(0.05, 10),
    a_max=st.floats(0.5, 200),
    dt=st.sampled_from([0.001, 0.005, 0.01, 0.02]),
)
def test_no_sequence_of_targets_breaks_a_limit(targets, repeat, q, v_max, a_max, dt):
    bounds = (Q_MIN, Q_MAX, v_max, a_max)
    commands, _ = drive(np.repeat(targets, repeat), q=q, dt=dt, bounds=bounds)
    assert_inside(commands, dt=dt, bounds=bounds)


@settings(max_examples=200, deadline=None)
@given(q=st.floats(Q_MIN, Q_MAX), target=st.floats(Q_MIN, Q_MAX), v_max=st.floats(0.1, 10), a_max=st.floats(1, 200))
def test_a_fixed_target_is_never_overshot(q, target, v_max, a_max):
    bounds = (Q_MIN, Q_MAX, v_max, a_max)
    commands, _ = drive([target] * 1500, q=q, bounds=bounds)
    side = np.sign(target - q)
    assert (side * (commands - target) <= 1e-12).all()
    assert abs(commands[-1] - target) < 1e-9 or abs(target - q) / v_max > 10


@settings(max_examples=200, deadline=None)
@given(gap=st.floats(0, 10), h=st.floats(1e-3, 1), dt=st.floats(1e-3, 0.1))
def test_braking_from_the_approach_speed_ends_at_the_gap(gap: float, h: float, dt: float):
    speed, travelled = approach_speed(gap, h, dt), 0.0
    while speed > 0:
        travelled += speed * dt
        speed -= h
    assert travelled == pytest.approx(gap, rel=1e-9, abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), joints=st.integers(1, 7))
def test_variants_equal_the_reference(seed: int, joints: int):
    rng = np.random.default_rng(seed)
    q, v, target = rng.uniform(-2, 2, joints), rng.uniform(-3, 3, joints), rng.uniform(-3, 3, joints)
    target[rng.random(joints) < 0.2] = np.nan
    bounds = (q - rng.uniform(-0.1, 2, joints), q + rng.uniform(0.1, 2, joints), rng.uniform(0.1, 5, joints))
    arguments = (q, v, target, *bounds, rng.uniform(1, 100, joints), float(rng.choice([0.001, 0.01])))
    expected_q, expected_v, expected_flags = limit_reference(*arguments)
    for variant in VARIANTS.values():
        q_next, v_next, flags = variant(*arguments)
        # Closed form against counted braking steps: a few ulp of the step sum.
        np.testing.assert_allclose(q_next, expected_q, rtol=0, atol=1e-12)
        np.testing.assert_allclose(v_next, expected_v, rtol=0, atol=1e-9)
        assert flags == expected_flags


def test_flags_are_bits_that_a_recorded_tick_keeps_its_meaning_by():
    assert (HELD, POSITION, VELOCITY, ACCELERATION) == (1, 2, 4, 8)


@pytest.mark.parametrize("variant", VARIANTS)
class TestFlags:
    """What each flag means at its edge, on one joint at 0; h = a_max * DT = 0.2 rad/s, one step of it 2 mrad."""

    def flags(self, variant: str, target: float, *, v: float = 0.0, v_max: float = V_MAX) -> int:
        bounds = [np.array([b]) for b in (Q_MIN, Q_MAX, v_max, A_MAX)]
        return VARIANTS[variant](np.zeros(1), np.array([v]), np.array([target]), *bounds, DT)[2]

    def test_a_step_that_just_fits_is_not_flagged_and_a_little_more_is(self, variant: str):
        assert self.flags(variant, 1.99e-3) == 0
        assert self.flags(variant, 2.01e-3) == ACCELERATION

    def test_what_rounding_may_add_is_no_cut_and_a_little_more_is(self, variant: str):
        """A period of 1 s and h = 1e-9 rad/s: a target of 2e-9 rad is cut by 1e-9 rad/s, which is TOLERANCE exactly."""
        one = np.ones(1)
        for target, flags in ((2e-9, 0), (3e-9, ACCELERATION)):
            arguments = (0 * one, 0 * one, target * one, -one, one, one, 1e-9 * one, 1.0)
            assert VARIANTS[variant](*arguments)[2] == flags

    def test_a_brake_that_is_too_weak_is_flagged(self, variant: str):
        assert self.flags(variant, 0.0, v=0.1) == 0
        assert self.flags(variant, 0.0, v=0.3) == ACCELERATION

    def test_the_end_of_the_range_is_inside(self, variant: str):
        assert not self.flags(variant, Q_MAX) & POSITION
        assert self.flags(variant, Q_MAX + 1e-6) & POSITION

    def test_full_speed_is_inside(self, variant: str):
        assert not self.flags(variant, 0.1 * DT, v_max=0.1) & VELOCITY
        assert self.flags(variant, 0.11 * DT, v_max=0.1) & VELOCITY


@settings(max_examples=200, deadline=None)
@given(v=st.floats(-3, 3), h=st.floats(0.01, 1), dt=st.floats(1e-3, 0.1), steps=st.integers(0, 60))
def test_the_braking_distance_is_that_of_the_steps_as_far_as_they_go(v: float, h: float, dt: float, steps: int):
    speed, travelled = abs(v), 0.0
    for _ in range(steps):
        speed = max(0.0, speed - h)
        travelled += speed * dt
    found = braking_distance(v, h, dt, steps)
    assert found == pytest.approx(np.copysign(travelled, v), rel=1e-9, abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(gap=st.floats(0, 2), h=st.floats(0.005, 1), dt=st.floats(1e-3, 0.1))
def test_counting_braking_steps_is_the_closed_form(gap: float, h: float, dt: float):
    assert approach_speed(gap, h, dt) == pytest.approx(approach_speed_reference(gap, h, dt), rel=1e-9, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), joints=st.integers(1, 4), size=st.integers(1, 12))
def test_smoothing_on_a_ring_is_the_mean_of_the_last_steps(seed: int, joints: int, size: int):
    rng = np.random.default_rng(seed)
    path, newest = rng.normal(size=(size, joints)), int(rng.integers(size))
    ticks, out = rng.integers(1, size + 1, joints), np.empty(joints)
    smooth(path, newest, ticks, out)
    in_order = np.roll(path, size - 1 - newest, axis=0)
    np.testing.assert_allclose(out, smooth_reference(in_order, ticks), atol=1e-12)


def test_a_path_is_averaged_over_as_many_steps_as_the_jerk_asks_for():
    a_max, j_max = np.full(4, 20.0), np.array([np.inf, 4000.0, 3999.0, 400.0])
    assert smoothing_ticks(a_max, j_max, DT).tolist() == [1, 1, 2, 10]
