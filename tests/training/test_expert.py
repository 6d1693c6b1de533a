"""The scripted expert: exact geometry, goals a servo can follow, lifts from anywhere, and recovery."""

import math

import numpy as np
import pytest

pytest.importorskip("mujoco")

from onbeat.drivers.twin.world import CUBE_RADIUS_M, Truth, World
from onbeat.training.expert import (
    CARRY_HEIGHT_M,
    CLOSED_RAD,
    GRASP_HEIGHT_M,
    HELD_STEPS,
    HOVER_HEIGHT_M,
    MAX_SPEED_CHANGE_RAD_S,
    MAX_SPEED_RAD_S,
    POLICY_PERIOD_NS,
    SERVO_STEP_RAD,
    STANDOFF_M,
    Expert,
    Grip,
    approach,
    execute,
    forward,
    inverse,
    lift,
    main,
    offset,
    polar,
)

PERIOD_S = POLICY_PERIOD_NS / 1e9


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def place(world: World, x: float, y: float) -> None:
    qpos = world.qpos_snapshot()
    qpos[6:13] = [x, y, 0.0125, 1, 0, 0, 0]
    world.set_qpos_snapshot(qpos)


def test_forward_is_where_the_simulator_puts_the_grip(world: World) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        q = rng.uniform([-1.5, -0.5, -0.5, 0, 0, 0], [1.5, 0.8, 0.8, 1.6, 0, 1])
        world.set_arm_rad(q)
        seen, said = polar(world.data.site("grasp").xpos), forward(q)
        assert offset(seen, said) == pytest.approx((0, 0), abs=1e-6)
        assert seen.height_m == pytest.approx(said.height_m, abs=1e-6)


@pytest.mark.parametrize("height_m", [GRASP_HEIGHT_M, HOVER_HEIGHT_M, CARRY_HEIGHT_M])
def test_inverse_reaches_the_whole_sector_within_the_ranges(world: World, height_m: float) -> None:
    for radius in np.linspace(CUBE_RADIUS_M[0] - STANDOFF_M, CUBE_RADIUS_M[1], 12):
        q = inverse(Grip(radius, 0.6, height_m), 0.3)
        back = forward(q)
        assert math.hypot(back.radius_m - radius, back.height_m - height_m) < 1e-6
        assert back.azimuth_rad == pytest.approx(0.6)
        assert (np.abs(q) <= world.model.jnt_range[:6, 1]).all(), q


def test_inverse_of_a_point_out_of_reach_is_the_stretched_arm() -> None:
    q = inverse(Grip(0.9, 0.0, 0.1), 0.3)
    assert np.isfinite(q).all()
    assert 0.25 < forward(q).radius_m < 0.45


def test_offset_turns_the_short_way_round() -> None:
    ahead, aside = offset(Grip(0.2, math.pi - 0.01, 0), Grip(0.15, -math.pi + 0.01, 0))
    assert ahead == pytest.approx(0.05)
    assert aside == pytest.approx(-0.02 * 0.2)


def test_approach_arrives_together_without_overshoot_inside_the_limits() -> None:
    position, velocity = np.zeros(3), np.zeros(3)
    target = np.array([1.0, -0.25, 0.0])
    for _ in range(60):
        following = approach(position, velocity, target)
        assert np.abs(following).max() <= MAX_SPEED_RAD_S
        assert np.abs(following - velocity).max() <= MAX_SPEED_CHANGE_RAD_S + 1e-12
        velocity = following
        position = position + velocity * PERIOD_S
        assert position[0] <= 1.0 + 1e-9
        assert position[1] == pytest.approx(-0.25 * position[0], abs=1e-9)
    assert position == pytest.approx(target, abs=1e-9)
    assert not np.abs(velocity).max() > 1e-6


def test_approach_brakes_within_the_limits_when_the_target_turns_back() -> None:
    velocity = np.array([1.5, 0.0])
    following = approach(np.array([0.5, 0.0]), velocity, np.array([0.0, 0.3]))
    assert following[0] == pytest.approx(1.5 - MAX_SPEED_CHANGE_RAD_S)
    assert 0 < following[1] < MAX_SPEED_CHANGE_RAD_S


class RecordingWorld:
    """Takes goals down instead of following them."""

    def __init__(self) -> None:
        self.goals: list[np.ndarray] = []
        self.ran_ns = 0

    def set_goal_rad(self, goal: np.ndarray) -> None:
        self.goals.append(goal)

    def step(self, duration_ns: int) -> None:
        self.ran_ns += duration_ns


def test_a_period_is_ten_ticks_of_whole_servo_steps() -> None:
    recording = RecordingWorld()
    start, end = np.zeros(6), np.linspace(-0.1, 0.2, 6)
    execute(recording, start, end)  # pyright: ignore[reportArgumentType]
    assert recording.ran_ns == POLICY_PERIOD_NS
    goals = np.stack(recording.goals)
    assert np.abs(goals - np.outer(np.arange(1, 11) / 10, end)).max() <= SERVO_STEP_RAD / 2 + 1e-12
    steps = goals / SERVO_STEP_RAD
    assert np.abs(steps - np.round(steps)).max() < 1e-9


@pytest.mark.parametrize(("seed", "start"), [(0, "home"), (1, "random"), (2, "random"), (3, "home")])
def test_it_lifts(world: World, seed: int, start: str) -> None:
    world.reset(seed, start=start)
    seconds = lift(world)
    assert seconds is not None
    assert 2.5 < seconds < 7.5
    assert world.truth().lifted


def test_its_goals_stay_in_range_and_speed(world: World) -> None:
    for seed in range(4):
        world.reset(seed, start="random")
        expert = Expert(world.position_rad)
        goals = [expert.goal_rad]
        for _ in range(60):
            goals.append(expert.advance(world.truth(), world.position_rad))
            execute(world, goals[-2], goals[-1])
        rows = np.stack(goals)
        speed = np.diff(rows, axis=0) / PERIOD_S
        assert (rows >= world.model.jnt_range[:6, 0]).all()
        assert (rows <= world.model.jnt_range[:6, 1]).all()
        assert np.abs(speed).max() <= 2.5
        assert np.abs(np.diff(speed, axis=0)).max() <= MAX_SPEED_CHANGE_RAD_S + 1e-9


def test_it_holds_what_it_lifted(world: World) -> None:
    world.reset(0)
    assert lift(world) is not None
    world.step(1_000_000_000)
    before = world.truth()
    world.step(5_000_000_000)
    after = world.truth()
    assert after.grasped
    assert np.linalg.norm(after.cube_position_m - before.cube_position_m) < 0.003


def test_it_takes_a_cube_at_any_yaw(world: World) -> None:
    for yaw in np.radians([-45, -30, 0, 22, 45]):
        world.reset(0)
        qpos = world.qpos_snapshot()
        qpos[6:13] = [0.22, 0.03, 0.0125, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        world.set_qpos_snapshot(qpos)
        assert lift(world) is not None, np.degrees(yaw)


def test_low_beside_the_cube_it_goes_up_first(world: World) -> None:
    world.reset(0)
    place(world, 0.24, 0.0)
    world.set_arm_rad(inverse(Grip(0.2, 0.22, 0.02), CLOSED_RAD))
    expert = Expert(world.position_rad)
    radius = forward(expert.goal_rad).radius_m
    goal = expert.goal_rad
    for _ in range(4):
        execute(world, goal, expert.advance(world.truth(), world.position_rad))
        goal = expert.goal_rad
    assert forward(goal).height_m > 0.025
    assert abs(forward(goal).radius_m - radius) < 0.004
    assert goal[0] == pytest.approx(-0.22, abs=1e-6), "not sideways through the cube"
    assert lift(world) is not None


def test_it_lifts_again_when_the_cube_is_put_elsewhere(world: World) -> None:
    world.reset(4)
    assert lift(world) is not None
    world.place_cube(11)
    assert not world.truth().lifted
    assert lift(world) is not None


def test_told_a_wrong_place_it_does_not_lift(world: World) -> None:
    world.reset(0)
    place(world, 0.22, 0.05)
    expert = Expert(world.position_rad)
    elsewhere = np.array([0.22, -0.05, 0.0125])
    for _ in range(80):
        goal = expert.goal_rad
        truth = world.truth()
        wrong = Truth(truth.time_ns, elsewhere, 0.0, lifted=False, grasped=truth.grasped)
        execute(world, goal, expert.advance(wrong, world.position_rad))
        assert not world.truth().lifted


def test_the_same_world_gives_the_same_goals(world: World) -> None:
    def goals() -> np.ndarray:
        world.reset(6, start="random")
        expert = Expert(world.position_rad)
        rows = [expert.goal_rad]
        for _ in range(15):
            rows.append(expert.advance(world.truth(), world.position_rad))
            execute(world, rows[-2], rows[-1])
        return np.stack(rows)

    assert np.array_equal(goals(), goals())


def test_success_needs_half_a_second(world: World) -> None:
    world.reset(0)
    seconds = lift(world)
    assert seconds is not None
    world.reset(0)
    assert lift(world, limit_s=seconds - PERIOD_S) is None
    assert pytest.approx(0.5) == HELD_STEPS * PERIOD_S


@pytest.mark.slow
def test_over_fifty_seeds_it_lifts_more_than_95_percent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "50", "--first", "500"]) == 0
    lifted = int(capsys.readouterr().out.split("lifted ")[1].split("/")[0])
    assert lifted > 47
