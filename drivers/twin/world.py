"""The twin's world: an SO-101, a table and a red cube in MuJoCo. Simulated time only; nothing here knows a wall clock.

python -m onbeat.drivers.twin.world --picture docs/images/twin.png
"""

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onbeat.drivers.twin.render import Renderer

mujoco: Any = importlib.import_module("mujoco")  # compiled, without types

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
VIEWS = ("top", "wrist")
SCENE = Path(__file__).with_name("scene.xml")

CUBE_SIDE_M = 0.025
LIFT_HEIGHT_M = 0.05
STALL_NM = 2.94  # STS3215 at 12 V
LOAD_TIME_CONSTANT_S = 0.05  # a servo reports its mean drive, not the jolt of one goal step
MAX_SPEED_RAD_S = 4.71  # the same without load: 45 turns per minute

# Where the cube is put: a sector in front, round the axis of the shoulder pan, all of it within a top-down grasp.
PAN_AXIS_X_M = 0.0388353
CUBE_RADIUS_M = (0.15, 0.23)
CUBE_AZIMUTH_RAD = (-0.6, 0.6)
CUBE_CLEARANCE_M = 0.06

HOME_RAD = np.array([0.0, -0.85, 0.52, 1.50, 0.0, 0.30])
HOME_NOISE_RAD = np.array([0.10, 0.08, 0.08, 0.08, 0.05, 0.10])
RAISED_LOW_RAD = np.array([-0.7, -1.0, -0.6, 0.4, -0.25, 0.0])
RAISED_HIGH_RAD = np.array([0.7, 0.3, 1.0, 1.6, 0.25, 0.9])
RAISED_MIN_HEIGHT_M = 0.07


@dataclass(frozen=True, slots=True)
class Truth:
    """What only the world knows. cube_position_m: (3,), centre, table frame. cube_height_m: 0 at rest on the table."""

    time_ns: int
    cube_position_m: NDArray[np.float64]
    cube_height_m: float
    lifted: bool
    grasped: bool


class World:
    """One arm and one cube, stepped by the caller. Not thread-safe; `render` belongs to its first caller's thread."""

    def __init__(self, seed: int = 0, frame_size: tuple[int, int] = (112, 112)) -> None:
        """frame_size: (height, width) of the frames in pixels, at most 480 x 640."""
        self.model = mujoco.MjModel.from_xml_path(str(SCENE))
        self.data = mujoco.MjData(self.model)
        largest = self.model.vis.global_.offheight, self.model.vis.global_.offwidth
        assert np.less_equal(frame_size, largest).all(), (frame_size, largest)
        self.frame_size = frame_size
        self._renderer: Renderer | None = None
        self._arm = slice(0, len(JOINTS))
        self._cube = slice(len(JOINTS), len(JOINTS) + 7)
        self._limits = self.model.jnt_range[: len(JOINTS)]
        self._step_ns = round(self.model.opt.timestep * 1e9)
        self._goal = np.zeros(len(JOINTS))
        self._load = np.zeros(len(JOINTS))
        self._load_gain = 1.0 - np.exp(-self.model.opt.timestep / LOAD_TIME_CONSTANT_S)
        self.reset(seed)

    @property
    def time_ns(self) -> int:
        """Simulated time since the last reset."""
        return self._steps * self._step_ns

    @property
    def step_ns(self) -> int:
        """Of the physics."""
        return self._step_ns

    @property
    def cube_height_m(self) -> float:
        """Of the cube above where it rests, as in `truth`, at next to no cost."""
        return float(self.data.qpos[self._cube.start + 2]) - CUBE_SIDE_M / 2

    @property
    def position_rad(self) -> NDArray[np.float64]:
        """Joint angles (6,), a copy."""
        return self.data.qpos[self._arm].copy()

    @property
    def goal_rad(self) -> NDArray[np.float64]:
        """The servos' position goals (6,), a copy."""
        return self._goal.copy()

    @property
    def velocity_rad_s(self) -> NDArray[np.float64]:
        """Joint velocities (6,), a copy."""
        return self.data.qvel[self._arm].copy()

    @property
    def load(self) -> NDArray[np.float64]:
        """Torque of each servo as a share of stall (6,), -1..1, smoothed over LOAD_TIME_CONSTANT_S. A copy."""
        return self._load.copy()

    def reset(self, seed: int, *, start: str = "home") -> None:
        """Put the arm at `start` ("home" with a little noise, "random": raised, gripper anywhere), the cube somewhere.

        The same seed and start give the same world. All servos hold their position.
        """
        assert start in ("home", "random"), start
        rng = np.random.default_rng([seed, start == "random"])
        mujoco.mj_resetData(self.model, self.data)
        self._steps = 0
        self.set_arm_rad(self._start_pose(rng, start))
        self.enable(np.ones(len(JOINTS), bool))
        self.place_cube(int(rng.integers(2**31)))

    def set_arm_rad(self, position: NDArray[np.float64]) -> None:
        """Put the arm at joint angles (6,), at rest and with its goals there. The caller keeps it clear of the cube."""
        self.data.qpos[self._arm] = position
        self.data.qvel[: len(JOINTS)] = 0
        self._goal[:] = self.data.ctrl[:] = position
        mujoco.mj_forward(self.model, self.data)
        self._load[:] = self.data.actuator_force / STALL_NM

    def place_cube(self, seed: int) -> None:
        """Put the cube at a random place and yaw on the table, at rest and clear of the jaws."""
        rng = np.random.default_rng(seed)
        grasp_m = self._grasp_m()
        place_m = _random_place(rng)
        while np.linalg.norm(place_m - grasp_m) < CUBE_CLEARANCE_M:
            place_m = _random_place(rng)
        yaw = rng.uniform(-np.pi / 4, np.pi / 4)
        self.data.qpos[self._cube] = [*place_m, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        self.data.qvel[len(JOINTS) :] = 0
        mujoco.mj_forward(self.model, self.data)

    def set_goal_rad(self, goal: NDArray[np.float64]) -> None:
        """Position goals (6,) in rad of the servos; clipped to the joints' ranges, as servos clip to theirs."""
        assert np.isfinite(goal).all(), goal
        np.clip(goal, self._limits[:, 0], self._limits[:, 1], out=self._goal)

    def enable(self, mask: NDArray[np.bool_]) -> None:
        """Torque on or off per joint, (6,)."""
        self.model.opt.disableactuator = sum(1 << j for j, on in enumerate(mask) if not on)
        self._enabled = np.array(mask, bool)

    def step(self, duration_ns: int) -> None:
        """Advance simulated time by `duration_ns`, to the nearest whole physics step (2 ms)."""
        for _ in range(round(duration_ns / self._step_ns)):
            self._slew()
            mujoco.mj_step(self.model, self.data)
            self._load += self._load_gain * (self.data.actuator_force / STALL_NM - self._load)
            self._steps += 1

    def render(self, view: str) -> NDArray[np.uint8]:
        """A new frame (height, width, 3) uint8 RGB of one of `VIEWS`, or of "picture". Raises RenderUnavailable."""
        if self._renderer is None:
            self._renderer = Renderer(self.model, *self.frame_size)
        return self._renderer.draw(self.data, view)

    def truth(self) -> Truth:
        """The state of the task, from the physics."""
        cube_m = self.data.qpos[self._cube][:3].copy()
        height_m = self.cube_height_m
        return Truth(self.time_ns, cube_m, height_m, height_m >= LIFT_HEIGHT_M, self._is_grasped())

    def qpos_snapshot(self) -> NDArray[np.float64]:
        """All that a picture depends on, (13,): lets another process draw this world."""
        return self.data.qpos.copy()

    def set_qpos_snapshot(self, qpos: NDArray[np.float64]) -> None:
        """Take over another world's snapshot, at rest."""
        self.data.qpos[:] = qpos
        self.data.qvel[:] = 0
        mujoco.mj_forward(self.model, self.data)

    def close(self) -> None:
        """Give the drawing context back; closing twice is harmless."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _slew(self) -> None:
        # A servo without torque keeps no set-point behind: when torque returns it starts from where the arm is.
        reach = MAX_SPEED_RAD_S * self.model.opt.timestep
        ctrl = self.data.ctrl
        ctrl += np.clip(self._goal - ctrl, -reach, reach)
        np.copyto(ctrl, self.data.qpos[self._arm], where=~self._enabled)

    def _start_pose(self, rng: np.random.Generator, start: str) -> NDArray[np.float64]:
        if start == "home":
            return HOME_RAD + HOME_NOISE_RAD * rng.uniform(-1, 1, len(JOINTS))
        while True:
            pose = rng.uniform(RAISED_LOW_RAD, RAISED_HIGH_RAD)
            self.data.qpos[self._arm] = pose
            if self._grasp_m()[2] > RAISED_MIN_HEIGHT_M:
                return pose

    def _grasp_m(self) -> NDArray[np.float64]:
        mujoco.mj_kinematics(self.model, self.data)
        return self.data.site("grasp").xpos.copy()

    def _is_grasped(self) -> bool:
        cube, *jaws = (self.model.geom(name).id for name in ("cube", "fixed_jaw", "moving_jaw"))
        pairs = self.data.contact.geom
        touching = pairs[(pairs == cube).any(axis=1)]
        return set(jaws) <= set(touching.ravel().tolist())


def _random_place(rng: np.random.Generator) -> NDArray[np.float64]:
    # Even over the sector's area: the square of the radius is uniform.
    radius = np.sqrt(rng.uniform(CUBE_RADIUS_M[0] ** 2, CUBE_RADIUS_M[1] ** 2))
    azimuth = rng.uniform(*CUBE_AZIMUTH_RAD)
    return np.array([PAN_AXIS_X_M + radius * np.cos(azimuth), radius * np.sin(azimuth), CUBE_SIDE_M / 2])


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the twin into a PNG file."""
    parser = argparse.ArgumentParser(
        prog="python -m onbeat.drivers.twin.world", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--picture", type=Path, required=True, help="PNG file to write, 640 x 480 pixels")
    parser.add_argument("--view", choices=("picture", *VIEWS), default="picture", help="camera to draw")
    parser.add_argument("--seed", type=int, default=0, help="where arm and cube are")
    options = parser.parse_args(argv)
    world = World(options.seed, frame_size=(480, 640))
    Image.fromarray(world.render(options.view)).save(options.picture)
    world.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
