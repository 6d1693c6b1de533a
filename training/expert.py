"""A scripted expert on the twin: from any pose it opens, goes above the cube, down, closes, lifts and holds.

    python -m onbeat.training.expert --seeds 50

It reads the world's truth, so it can only teach: `onbeat run` never imports it.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.twin.world import CUBE_SIDE_M, JOINTS, PAN_AXIS_X_M, Truth, World

POLICY_PERIOD_NS = 100_000_000
TICK_NS = 10_000_000
TICKS_PER_STEP = POLICY_PERIOD_NS // TICK_NS
SERVO_STEP_RAD = 2 * math.pi / 4096

# The chain in its vertical plane, from drivers/twin/scene.xml: radius is counted from the axis of the shoulder pan.
SHOULDER_M = (0.0303992, 0.1166)
UPPER_M, UPPER_LEAN_RAD = math.hypot(0.0280, 0.11257), math.atan2(0.0280, 0.11257)
FORE_M, FORE_RISE_RAD = math.hypot(0.1349, 0.0052), math.atan2(0.0052, 0.1349)
TOOL_M, TOOL_SIDE_M = 0.0611 + 0.0920, 0.0046

DOWN_RAD = math.pi / 2
WRIST_MAX_RAD = 1.60  # of a range to 1.658: turning back while moving overshoots by up to 0.05
LEAN_STEP_RAD = 0.005
OPEN_RAD = 0.65
CLOSED_RAD = 0.12
HELD_STEPS = 5  # lifted for 0.5 s without interruption is success
FIRM_RAD = 0.08  # the goal this far beyond the jaw: the servo presses with all it has

GRASP_HEIGHT_M = CUBE_SIDE_M / 2
HOVER_HEIGHT_M = 0.065
CARRY_HEIGHT_M = GRASP_HEIGHT_M + 0.09
CLEAR_HEIGHT_M = 0.045  # the jaws pass over the cube from here on
ARRIVED_M, STILL_RAD_S = 0.005, 0.25
STANDOFF_M = 0.012  # the fixed jaw comes down this far short of the cube; closing brings the cube to it

MAX_SPEED_RAD_S = 1.8
# A row turns the speed of the interpolated goals in one tick: 0.18 rad/s in 10 ms is 18 rad/s^2, inside the robot's 20.
MAX_SPEED_CHANGE_RAD_S = 0.18


@dataclass(frozen=True, slots=True)
class Grip:
    """Where the point between the jaws is: radius from the pan axis and height in m, azimuth in rad (positive left)."""

    radius_m: float
    azimuth_rad: float
    height_m: float


def forward(q: NDArray[np.float64]) -> Grip:
    """The grip point for joint angles (6,). The roll is taken as 0: at 0.25 rad the point is off by 1.2 mm."""
    upper, fore, tool = q[1] + UPPER_LEAN_RAD, q[1] + q[2] - FORE_RISE_RAD, q[1] + q[2] + q[3]
    radius = SHOULDER_M[0] + UPPER_M * math.sin(upper) + FORE_M * math.cos(fore)
    height = SHOULDER_M[1] + UPPER_M * math.cos(upper) - FORE_M * math.sin(fore)
    radius += TOOL_M * math.cos(tool) + TOOL_SIDE_M * math.sin(tool)
    height += -TOOL_M * math.sin(tool) + TOOL_SIDE_M * math.cos(tool)
    return Grip(radius, -float(q[0]), height)


def inverse(grip: Grip, gripper_rad: float) -> NDArray[np.float64]:
    """Joint angles (6,) that bring the grip point there, elbow up, roll 0, the gripper straight down if it can be.

    High up the wrist reaches its limit, and the gripper leans outwards. A point out of reach gives the arm stretched
    towards it.
    """
    tool = DOWN_RAD
    lift, elbow = _plane(grip, tool)
    while tool - lift - elbow > WRIST_MAX_RAD:
        tool -= LEAN_STEP_RAD
        lift, elbow = _plane(grip, tool)
    return np.array([-grip.azimuth_rad, lift, elbow, tool - lift - elbow, 0.0, gripper_rad])


def _plane(grip: Grip, tool: float) -> tuple[float, float]:
    """Shoulder lift and elbow flex for the grip point, the tool `tool` rad below the horizontal."""
    x = grip.radius_m - TOOL_M * math.cos(tool) - TOOL_SIDE_M * math.sin(tool) - SHOULDER_M[0]
    z = grip.height_m + TOOL_M * math.sin(tool) - TOOL_SIDE_M * math.cos(tool) - SHOULDER_M[1]
    cosine = (x * x + z * z - UPPER_M**2 - FORE_M**2) / (2 * UPPER_M * FORE_M)
    bend = math.acos(min(max(cosine, -1.0), 1.0))
    upper = math.atan2(x, z) - math.atan2(FORE_M * math.sin(bend), UPPER_M + FORE_M * math.cos(bend))
    return upper - UPPER_LEAN_RAD, bend + UPPER_LEAN_RAD + FORE_RISE_RAD - math.pi / 2


def polar(point_m: NDArray[np.float64]) -> Grip:
    """A point (3,) of the table frame, seen from the pan axis."""
    x, y = point_m[0] - PAN_AXIS_X_M, point_m[1]
    return Grip(math.hypot(x, y), math.atan2(y, x), float(point_m[2]))


def offset(cube: Grip, grip: Grip) -> tuple[float, float]:
    """How far the cube is ahead of the grip point along the radius, and aside of it to the left, in m."""
    turn = math.remainder(cube.azimuth_rad - grip.azimuth_rad, 2 * math.pi)
    return cube.radius_m - grip.radius_m, cube.radius_m * turn


class Expert:
    """Turns the truth into goals, one row per policy period. It acts on the present alone, and so recovers."""

    def __init__(self, position_rad: NDArray[np.float64]) -> None:
        """position_rad: (6,), the arm at rest: the first goal, due now."""
        self.goal_rad = np.array(position_rad, np.float64)
        self._velocity_rad_s = np.zeros(len(JOINTS))

    def is_still(self) -> bool:
        """Whether the goals have all but stopped moving."""
        return float(np.max(np.abs(self._velocity_rad_s))) < STILL_RAD_S

    def advance(self, truth: Truth, position_rad: NDArray[np.float64]) -> NDArray[np.float64]:
        """The goal (6,) due one policy period after the present state, given as truth and measured angles (6,)."""
        target = self._target(truth, position_rad)
        self._velocity_rad_s = approach(self.goal_rad, self._velocity_rad_s, target)
        self.goal_rad = self.goal_rad + self._velocity_rad_s * (POLICY_PERIOD_NS / 1e9)
        return self.goal_rad

    def _target(self, truth: Truth, position_rad: NDArray[np.float64]) -> NDArray[np.float64]:
        cube, grip, goal = polar(truth.cube_position_m), forward(position_rad), forward(self.goal_rad)
        if truth.grasped and self.goal_rad[5] < position_rad[5] - FIRM_RAD:
            return inverse(Grip(goal.radius_m, goal.azimuth_rad, CARRY_HEIGHT_M), CLOSED_RAD)
        if not self._may_descend(cube, grip):
            above = cube.radius_m - STANDOFF_M, cube.azimuth_rad
            place = above if grip.height_m > CLEAR_HEIGHT_M else (goal.radius_m, goal.azimuth_rad)
            return inverse(Grip(*place, HOVER_HEIGHT_M), OPEN_RAD)
        is_down = grip.height_m < GRASP_HEIGHT_M + ARRIVED_M
        place = (goal.radius_m, goal.azimuth_rad) if is_down else (cube.radius_m - STANDOFF_M, cube.azimuth_rad)
        return inverse(Grip(*place, GRASP_HEIGHT_M), CLOSED_RAD if is_down else OPEN_RAD)

    def _may_descend(self, cube: Grip, grip: Grip) -> bool:
        """From hovering: once at rest over the spot. Lower down: while the cube is between the jaws."""
        ahead, aside = offset(cube, grip)
        if grip.height_m > HOVER_HEIGHT_M - ARRIVED_M:
            return self.is_still() and math.hypot(ahead - STANDOFF_M, aside) < ARRIVED_M
        return -0.005 < ahead < 0.024 and abs(aside) < 0.008


def approach(
    position: NDArray[np.float64], velocity: NDArray[np.float64], target: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Next velocities (J,) on the way to `target` (J,): straight in joint space, within speed and change of speed.

    Each joint could stop at its target; the slowest sets the pace of all, so that they arrive together.
    """
    period_s, change = POLICY_PERIOD_NS / 1e9, MAX_SPEED_CHANGE_RAD_S
    distance = target - position
    away = np.abs(distance) / period_s
    # Braking by `change` a row, n rows with speeds v, v - change, ... add up to the distance.
    rows = np.maximum(np.ceil(np.sqrt(0.25 + 2 * away / change) - 0.5), 1)
    fastest = np.minimum(away / rows + change * (rows - 1) / 2, MAX_SPEED_RAD_S)
    pace = np.min(fastest / np.maximum(away, 1e-9), where=away > 1e-6, initial=1) / period_s
    turn = distance * pace - velocity
    return velocity + turn * (change / max(float(np.max(np.abs(turn))), change))


def execute(world: World, start_rad: NDArray[np.float64], end_rad: NDArray[np.float64]) -> None:
    """Run one policy period: goals (6,) go from `start_rad` to `end_rad` in even ticks, in whole servo steps."""
    for tick in range(1, TICKS_PER_STEP + 1):
        goal = start_rad + (end_rad - start_rad) * (tick / TICKS_PER_STEP)
        world.set_goal_rad(np.round(goal / SERVO_STEP_RAD) * SERVO_STEP_RAD)
        world.step(TICK_NS)


def lift(world: World, *, limit_s: float = 15.0) -> float | None:
    """Let the expert lift the cube of `world`; the simulated time in s until it was held up, None if never."""
    expert = Expert(world.position_rad)
    held = 0
    for step in range(round(limit_s * 1e9) // POLICY_PERIOD_NS):
        goal = expert.goal_rad
        execute(world, goal, expert.advance(world.truth(), world.position_rad))
        held = held + 1 if world.truth().lifted else 0
        if held >= HELD_STEPS:
            return (step + 1) * POLICY_PERIOD_NS / 1e9
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the expert's success over fresh seeds, from home and from raised poses in turn."""
    parser = argparse.ArgumentParser(
        prog="python -m onbeat.training.expert", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=50, help="worlds to try")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args(argv)
    world = World()
    times = []
    for seed in range(options.first, options.first + options.seeds):
        world.reset(seed, start="random" if seed % 2 else "home")
        times.append(lift(world))
    lifted = [t for t in times if t is not None]
    missed = [options.first + i for i, t in enumerate(times) if t is None]
    print(f"lifted {len(lifted)}/{len(times)}   seeds missed: {missed or 'none'}")
    if lifted:
        p50, p95, most = np.quantile(lifted, [0.5, 0.95, 1.0])
        print(f"time until held for 0.5 s, s: p50 {p50:.1f}   p95 {p95:.1f}   max {most:.1f}")
    return 0 if lifted else 1


if __name__ == "__main__":
    raise SystemExit(main())
