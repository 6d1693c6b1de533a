"""The twin's world: the published arm, servos with limits, a cube that obeys physics, pictures that show it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")

from onbeat.drivers.twin import render
from onbeat.drivers.twin.world import (
    CUBE_AZIMUTH_RAD,
    CUBE_CLEARANCE_M,
    CUBE_RADIUS_M,
    JOINTS,
    LIFT_HEIGHT_M,
    MAX_SPEED_RAD_S,
    PAN_AXIS_X_M,
    RAISED_MIN_HEIGHT_M,
    VIEWS,
    World,
)

ROOT = Path(__file__).resolve().parents[2]

# Joint axes in the vertical plane at zero angles (x, z in m): the maker's so101_new_calib.xml, chained by hand,
# less its 2.8 degree twist of the roll.
PUBLISHED_AXES_M = {
    "shoulder_pan": (0.03884, None),
    "shoulder_lift": (0.06923, 0.11660),
    "elbow_flex": (0.09723, 0.22917),
    "wrist_flex": (0.23213, 0.23437),
    "wrist_roll": (None, 0.23437),
    "gripper": (0.31663, 0.25457),
}
PUBLISHED_MASS_KG = 0.147 + 0.100006 + 0.103 + 0.104 + 0.079 + 0.087 + 0.012
HALF_TURN_OFF = np.array([1.91986, 1.74533, 1.69, 1.65806, 2.79253])


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def cube_polar(world: World) -> tuple[float, float]:
    x, y, _ = world.truth().cube_position_m
    return float(np.hypot(x - PAN_AXIS_X_M, y)), float(np.arctan2(y, x - PAN_AXIS_X_M))


def test_the_arm_is_the_published_one(world: World) -> None:
    world.set_arm_rad(np.zeros(6))
    for name, (x, z) in PUBLISHED_AXES_M.items():
        anchor = world.data.joint(name).xanchor
        assert x is None or anchor[0] == pytest.approx(x, abs=2e-5), name
        assert z is None or anchor[2] == pytest.approx(z, abs=2e-5), name
    arm = sum(world.model.body(b).mass[0] for b in range(1, world.model.nbody)) - world.model.body("cube").mass[0]
    assert arm == pytest.approx(PUBLISHED_MASS_KG, abs=1e-6)
    assert np.allclose(world.model.jnt_range[:5], np.stack([-HALF_TURN_OFF, HALF_TURN_OFF], 1))
    assert np.allclose(world.model.jnt_range[5], [-0.174533, 1.745329])


def test_positive_angles_mean_what_they_mean_on_the_real_arm(world: World) -> None:
    def grip_moves(joint: int) -> np.ndarray:
        world.set_arm_rad(np.zeros(6))
        before = world.data.site("grasp").xpos.copy()
        world.set_arm_rad(np.eye(6)[joint] * 0.1)
        return world.data.site("grasp").xpos - before

    assert grip_moves(0)[1] < -0.02, "pan turns right"
    assert all(grip_moves(joint)[2] < -0.01 for joint in (1, 2, 3)), "lift, elbow and wrist lower the gripper"


@pytest.mark.parametrize("start", ["home", "random"])
def test_reset_is_a_function_of_seed_and_start(world: World, start: str) -> None:
    def state(seed: int) -> np.ndarray:
        world.reset(seed, start=start)
        return world.qpos_snapshot()

    first = state(7)
    world.step(300_000_000)
    assert np.array_equal(state(7), first)
    assert not np.allclose(state(8)[:6], first[:6])
    assert not np.allclose(state(8)[6:8], first[6:8])


def test_reset_refuses_an_unknown_start(world: World) -> None:
    with pytest.raises(AssertionError, match="upside_down"):
        world.reset(0, start="upside_down")


def test_reset_undoes_everything(world: World) -> None:
    world.enable(np.zeros(6, bool))
    world.step(100_000_000)
    world.reset(3)
    assert world.time_ns == 0
    assert np.array_equal(world.goal_rad, world.position_rad)
    assert not world.velocity_rad_s.any()
    world.step(500_000_000)
    assert np.allclose(world.position_rad, world.goal_rad, atol=0.01), "torque is back"


def test_cubes_lie_in_the_sector_and_clear_of_the_jaws(world: World) -> None:
    for seed in range(200):
        world.reset(seed, start="random" if seed % 2 else "home")
        radius, azimuth = cube_polar(world)
        assert CUBE_RADIUS_M[0] <= radius <= CUBE_RADIUS_M[1], seed
        assert CUBE_AZIMUTH_RAD[0] <= azimuth <= CUBE_AZIMUTH_RAD[1], seed
        distance = np.linalg.norm(world.truth().cube_position_m - world.data.site("grasp").xpos)
        assert distance >= CUBE_CLEARANCE_M - 1e-9, seed


def test_random_starts_are_raised_and_within_range(world: World) -> None:
    for seed in range(100):
        world.reset(seed, start="random")
        assert world.data.site("grasp").xpos[2] > RAISED_MIN_HEIGHT_M, seed
        assert (world.position_rad >= world.model.jnt_range[:6, 0]).all(), seed
        assert (world.position_rad <= world.model.jnt_range[:6, 1]).all(), seed


def test_a_placed_cube_moves_alone(world: World) -> None:
    world.reset(0)
    arm, before = world.position_rad, world.truth().cube_position_m
    world.place_cube(99)
    assert np.array_equal(world.position_rad, arm)
    assert np.linalg.norm(world.truth().cube_position_m - before) > 0.005


def test_a_cube_on_the_table_stays_there(world: World) -> None:
    world.reset(1)
    before = world.truth().cube_position_m
    world.step(2_000_000_000)
    truth = world.truth()
    assert np.allclose(truth.cube_position_m, before, atol=1e-3)
    assert abs(truth.cube_height_m) < 1e-3
    assert not truth.lifted
    assert not truth.grasped


@pytest.mark.parametrize(("height_m", "lifted"), [(LIFT_HEIGHT_M - 1e-4, False), (LIFT_HEIGHT_M + 1e-4, True)])
def test_lifted_is_five_centimetres(world: World, height_m: float, lifted: bool) -> None:
    world.reset(0)
    qpos = world.qpos_snapshot()
    qpos[8] = 0.0125 + height_m
    world.set_qpos_snapshot(qpos)
    assert world.truth().lifted is lifted
    world.step(500_000_000)
    assert not world.truth().lifted, "nothing holds it"


def test_time_counts_whole_physics_steps(world: World) -> None:
    world.reset(0)
    for _ in range(7):
        world.step(10_000_000)
    assert world.time_ns == 70_000_000
    world.step(0)
    assert world.time_ns == 70_000_000


def test_a_free_swing_loads_a_servo_with_its_friction_alone(world: World) -> None:
    """Goals come in steps of a tick; the jolt of each is no load, or a fast swing would trip the protection."""
    world.reset(5)
    goal = world.position_rad
    loads = []
    for _ in range(100):
        goal[0] += 0.003  # 0.3 rad/s
        world.set_goal_rad(goal)
        for _ in range(5):
            world.step(2_000_000)
            loads.append(world.load[0])
    friction_nm = 0.6 * 0.3 + 0.052  # damping and dry friction of scene.xml
    assert np.mean(loads[250:]) * 2.94 == pytest.approx(friction_nm, rel=0.15)  # the joint pulses with the goal
    assert np.max(loads) < 0.15


def test_servos_hold_the_arm_and_name_the_load(world: World) -> None:
    world.reset(0)
    world.step(1_000_000_000)
    assert np.abs(world.position_rad - world.goal_rad).max() < 0.01
    load = world.load
    assert 0.02 < abs(load[1]) < 1, "the shoulder carries the arm"
    assert abs(load[4]) < 0.02, "nothing twists the roll"


def test_goals_beyond_the_range_stop_at_it(world: World) -> None:
    world.reset(0)
    world.set_goal_rad(np.array([9.0, 0, 0, 0, 0, -9.0]))
    assert world.goal_rad[0] == pytest.approx(1.91986)
    assert world.goal_rad[5] == pytest.approx(-0.174533)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_goal_that_is_no_number_is_refused(world: World, bad: float) -> None:
    world.reset(0)
    with pytest.raises(AssertionError):
        world.set_goal_rad(np.array([0, bad, 0, 0, 0, 0]))


def test_a_jump_of_the_goal_is_followed_at_the_servos_speed(world: World) -> None:
    world.reset(0)
    start = world.position_rad[0]
    world.set_goal_rad(world.goal_rad + np.array([1.5, 0, 0, 0, 0, 0]))
    fastest = 0.0
    for _ in range(20):
        world.step(10_000_000)
        fastest = max(fastest, world.velocity_rad_s[0])
    assert 0.8 * MAX_SPEED_RAD_S < fastest < 1.1 * MAX_SPEED_RAD_S
    world.step(800_000_000)
    assert world.position_rad[0] == pytest.approx(start + 1.5, abs=0.01)


def test_torque_off_lets_one_joint_fall_and_on_brings_it_back(world: World) -> None:
    world.reset(0)
    world.enable(np.array([True, True, False, True, True, True]))
    world.step(1_000_000_000)
    moved = np.abs(world.position_rad - world.goal_rad)
    assert moved[2] > 0.1, "the elbow fell"
    assert moved[0] < 0.01, "the others hold"
    assert world.load[2] == 0
    world.enable(np.ones(6, bool))
    world.step(1_500_000_000)
    assert np.abs(world.position_rad - world.goal_rad).max() < 0.02


def test_readings_are_copies(world: World) -> None:
    world.reset(0)
    for reading in (world.position_rad, world.velocity_rad_s, world.load, world.goal_rad, world.qpos_snapshot()):
        reading[:] = 5.0
    assert world.position_rad.max() < 2
    assert world.goal_rad.max() < 2


@pytest.mark.parametrize("view", VIEWS)
def test_a_frame_is_the_callers_own_and_shows_the_cube(world: World, view: str) -> None:
    world.reset(0)
    qpos = world.qpos_snapshot()
    qpos[6:9] = [0.25, 0.01, 0.0125]
    world.set_qpos_snapshot(qpos)
    frame = world.render(view)
    assert frame.shape == (112, 112, 3)
    assert frame.dtype == np.uint8
    kept = frame.copy()
    qpos[6] += 0.03
    world.set_qpos_snapshot(qpos)
    moved = world.render(view)
    assert np.array_equal(frame, kept)
    assert (frame != moved).any(axis=2).sum() > 20
    assert count_red(frame) > 30


def test_the_top_view_sees_every_place_of_the_cube(world: World) -> None:
    world.reset(0)
    for seed in range(60):
        world.place_cube(seed)
        assert count_red(world.render("top")) >= 30, seed


def count_red(frame: np.ndarray) -> int:
    r, g, b = (frame[..., c].astype(int) for c in range(3))
    return int(((r > 120) & (g < 60) & (b < 60)).sum())


def test_a_snapshot_draws_the_same_picture_elsewhere(world: World) -> None:
    world.reset(5, start="random")
    world.step(200_000_000)
    other = World(seed=9)
    other.set_qpos_snapshot(world.qpos_snapshot())
    assert np.array_equal(other.render("wrist"), world.render("wrist"))
    other.close()
    other.close()


def test_frames_larger_than_the_buffer_are_refused() -> None:
    with pytest.raises(AssertionError, match="1000"):
        World(frame_size=(1000, 1000))


def test_without_egl_osmesa_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(render.ctypes, "CDLL", no_library)
    assert not render.egl_works()
    assert render.backend() == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert render.backend() == "egl", "what the user names is taken"


def test_a_machine_that_cannot_draw_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn = World()

    def no_module(name: str) -> None:
        raise AttributeError(f"{name}: 'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(render, "_open_context", lambda width, height: open_blocked(no_module, width, height))
    with pytest.raises(render.RenderUnavailable, match=r"apt-get install libegl1 libgl1-mesa-dri libosmesa6"):
        undrawn.render("top")


OPEN_CONTEXT = render._open_context


def open_blocked(import_module, width: int, height: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render.importlib, "import_module", import_module)
        return OPEN_CONTEXT(width, height)


DRAW = """
from onbeat.drivers.twin.world import World
world = World(4)
print(world.render("top").tobytes().hex())
world.close()
"""


@pytest.mark.slow
def test_both_backends_draw_the_same_picture() -> None:
    def draw(backend: str) -> bytes:
        environment = {**os.environ, "MUJOCO_GL": backend}
        environment.pop("PYOPENGL_PLATFORM", None)
        command = [sys.executable, "-c", DRAW]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return bytes.fromhex(result.stdout.strip())

    egl, osmesa = (np.frombuffer(draw(b), np.uint8).astype(int) for b in ("egl", "osmesa"))
    assert len(egl) == 112 * 112 * 3
    # Two builds of one rasteriser: edges may round differently.
    assert (np.abs(egl - osmesa) > 8).mean() < 0.01


def test_joints_are_the_servos_in_bus_order(world: World) -> None:
    assert tuple(world.model.actuator(i).name for i in range(6)) == JOINTS
    assert tuple(world.model.joint(i).name for i in range(6)) == JOINTS
    assert [world.model.actuator_group[i] for i in range(6)] == list(range(6)), "enable() counts on it"
