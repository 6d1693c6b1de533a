"""The figures of decision 0009: what frames and physics cost, how closely the arm follows, how firmly a cube is held.

Run from the repository root: python docs/decisions/0009_twin_model.py (MUJOCO_GL=osmesa for the other backend)
"""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.twin.render import backend
from onbeat.drivers.twin.world import VIEWS, World, mujoco
from onbeat.training.expert import lift

SECOND_NS = 1_000_000_000


def frame_times_ms(size: int, view: str, frames: int = 100) -> NDArray[np.float64]:
    world = World(frame_size=(size, size))
    world.render(view)
    times = []
    for _ in range(frames):
        world.step(20_000_000)
        began = time.perf_counter()
        world.render(view)
        times.append((time.perf_counter() - began) * 1e3)
    world.close()
    return np.array(times)


def simulated_seconds_per_second() -> float:
    world = World()
    began = time.perf_counter()
    world.step(10 * SECOND_NS)
    return 10 / (time.perf_counter() - began)


def distance_rad(speed_rad_s: float = 1.0) -> float:
    world = World()
    goal = world.goal_rad
    for _ in range(60):
        goal[0] += speed_rad_s * 0.01
        world.set_goal_rad(goal)
        world.step(10_000_000)
    return abs(float(goal[0] - world.position_rad[0]))


def sag_rad() -> float:
    world = World()
    world.step(SECOND_NS)
    return float(np.abs(world.position_rad - world.goal_rad).max())


def slips_mm(prepare: Callable[[Any], None], seeds: int = 30) -> NDArray[np.float64]:
    world = World()
    prepare(world.model.opt)
    slips = []
    for seed in range(seeds):
        world.reset(seed)
        if lift(world) is None:
            continue
        world.step(SECOND_NS)
        before = world.truth().cube_position_m
        world.step(10 * SECOND_NS)
        slips.append(np.linalg.norm(world.truth().cube_position_m - before) * 1e3)
    return np.array(slips)


def leave(_option: Any) -> None:
    pass


def make_pyramidal(option: Any) -> None:
    option.cone = mujoco.mjtCone.mjCONE_PYRAMIDAL
    option.impratio = 1
    option.noslip_iterations = 0


def main() -> None:
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, MuJoCo {mujoco.__version__}, {backend()}")
    for size in (112, 224):
        for view in VIEWS:
            p50, p95 = np.quantile(frame_times_ms(size, view), [0.5, 0.95])
            print(f"frame {size} {view:<6} ms       p50 {p50:.1f}  p95 {p95:.1f}")
    print(f"simulated seconds per second  {simulated_seconds_per_second():.0f}")
    print(f"sag rad                       {sag_rad():.4f}")
    print(f"off the goal at 1 rad/s, rad  {distance_rad():.4f}")
    for name, prepare in (("as chosen", leave), ("pyramidal, plain", make_pyramidal)):
        slips = slips_mm(prepare)
        print(f"slip in 10 s, {name:<16} p50 {np.median(slips):.2f}  max {slips.max():.2f} mm, {len(slips)} lifts")


if __name__ == "__main__":
    main()
