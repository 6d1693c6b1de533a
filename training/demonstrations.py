"""Demonstrations: what the expert saw and did, as a LeRobot dataset, one episode a lift, and the command that collects.

    python -m onbeat.training.demonstrations --episodes 480 --seed 1000 --out DIR --workers 2

Letters: T policy steps, V views, H x W pixels, J joints. What and why: docs/decisions/0010-demonstrations.md.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.twin.world import JOINTS, VIEWS, World
from onbeat.embodiment.errors import run_module
from onbeat.embodiment.schema import load_embodiment
from onbeat.training.data.columns import ACTION, EVENTS, IMAGES, STATE
from onbeat.training.data.layout import DataError, Feature
from onbeat.training.data.reader import Dataset, open_dataset
from onbeat.training.data.writer import DatasetWriter, check_vacant
from onbeat.training.expert import CLEAR_HEIGHT_M, OPEN_RAD, POLICY_PERIOD_NS, Expert, Grip, execute, inverse, polar

INSTRUCTION = "lift the red cube"
ROBOT = "so101"
CONTACT = EVENTS + "contact"
CUBE = "observation.environment_state"  # LeRobot's name for what only the world knows
STEPS_PER_S = 1_000_000_000 / POLICY_PERIOD_NS
FRAME_SIZE = (112, 112)
LIFTS_PER_CHAIN = 3
REST_STEPS = 5  # held still at the end of a lift
MAX_STEPS = 150


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One lift, policy step k at time t_k.

    frames: (T, V, H, W, 3) uint8, as seen at t_k. state_rad: (T, J) float32, measured at t_k. action_rad: (T, J)
    float32, the expert's goal due at t_k, free of the disturbance that was executed with it. cube_m: (T, 3) float32,
    for analysis and for auxiliary losses in training only. contact: (T,) bool, where the jaws have just taken the cube.
    start: "home", "random", "near" (beside the cube) or "chained" (the arm as the lift before left it).
    At the last step the expert holds still: a chunk that reaches beyond it repeats the last row.
    """

    frames: NDArray[np.uint8]
    state_rad: NDArray[np.float32]
    action_rad: NDArray[np.float32]
    cube_m: NDArray[np.float32]
    contact: NDArray[np.bool_]
    seed: int
    start: str

    def __len__(self) -> int:
        return len(self.state_rad)


def write_demonstrations(
    directory: Path, demonstrations: Iterable[Demonstration], instruction: str, about: Mapping[str, Any] | None = None
) -> int:
    """Write a LeRobot dataset, every frame without loss; returns the number of steps. about: kept in meta/info.json.

    Nothing appears before all is written. Raises DataError where the folder holds something or an episode does not fit.
    """
    episodes = iter(demonstrations)
    first = next(episodes, None)
    if first is None:
        raise DataError(f"{directory} would hold no demonstration: collect some")
    robot, about = load_embodiment(ROBOT), about or {}
    features = describe_features(first.frames.shape[2:4])
    with DatasetWriter(directory, fps=STEPS_PER_S, features=features, robot_type=robot.name, about=about) as writer:
        for demonstration in itertools.chain([first], episodes):
            extra = {"seed": demonstration.seed, "start": demonstration.start}
            writer.add_episode(_columns(demonstration), instruction, extra)
    return writer.rows


def describe_features(frame_size: tuple[int, ...]) -> dict[str, Feature]:
    """The columns of the dataset. frame_size: (H, W)."""
    joints = list(load_embodiment(ROBOT).joints)
    camera = Feature("video", (*frame_size, 3), ["height", "width", "channels"])
    return {
        STATE: Feature("float32", (len(joints),), joints),
        ACTION: Feature("float32", (len(joints),), joints),
        CUBE: Feature("float32", (3,), ["cube_x", "cube_y", "cube_z"]),
        CONTACT: Feature("bool", (1,)),
        **{IMAGES + view: camera for view in VIEWS},
    }


def read_demonstrations(directory: Path) -> list[Demonstration]:
    """Every demonstration of a dataset, in its order. Raises DataError for what is missing or damaged."""
    dataset = open_dataset(directory)
    for name in (STATE, ACTION, CUBE, CONTACT, *(IMAGES + view for view in VIEWS)):
        if name not in dataset.info.features:
            raise DataError(f"{directory} has no column '{name}': run `python -m onbeat.training.demonstrations`")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda episode: _read_demonstration(dataset, episode), range(len(dataset.episodes))))


def _read_demonstration(dataset: Dataset, episode: int) -> Demonstration:
    state, action, cube, contact = (dataset.numbers(episode, name) for name in (STATE, ACTION, CUBE, CONTACT))
    frames = np.stack([dataset.frames(episode, IMAGES + view) for view in VIEWS], axis=1)
    extra = dataset.episodes[episode].extra
    told = {"seed": extra.get("seed", -1), "start": extra.get("start", "unknown")}
    return Demonstration(frames, state, action, cube, contact[:, 0], **told)


def _columns(demonstration: Demonstration) -> dict[str, NDArray[Any]]:
    numbers = {
        STATE: demonstration.state_rad,
        ACTION: demonstration.action_rad,
        CUBE: demonstration.cube_m,
        CONTACT: demonstration.contact,
    }
    return numbers | {IMAGES + view: demonstration.frames[:, i] for i, view in enumerate(VIEWS)}


class Disturbance:
    """Offsets added to the executed goals: a slow tremor, and a smooth push now and then.

    The label stays clean, so the learner sees what recovery looks like (DART, Laskey et al. 2017, arXiv:1703.09327).
    """

    TREMOR_RAD = 0.008
    TREMOR_MEMORY = 0.8  # per policy step
    PUSH_CHANCE = 0.07  # per policy step without one
    PUSH_RAD = np.array([0.12, 0.10, 0.10, 0.10, 0.12, 0.25])
    PUSH_STEPS = (5, 12)

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._tremor = np.zeros(len(JOINTS))
        self._push = np.zeros(len(JOINTS))
        self._left, self._length = 0, 1

    def advance(self) -> NDArray[np.float64]:
        """The offset (J,) in rad for the goals due at the next policy step."""
        rng = self._rng
        fresh = math.sqrt(1 - self.TREMOR_MEMORY**2) * self.TREMOR_RAD
        self._tremor = self.TREMOR_MEMORY * self._tremor + fresh * rng.standard_normal(len(JOINTS))
        if self._left == 0 and rng.random() < self.PUSH_CHANCE:
            self._left = self._length = int(rng.integers(*self.PUSH_STEPS))
            self._push = self.PUSH_RAD * rng.uniform(-1, 1, len(JOINTS))
        self._left = max(self._left - 1, 0)
        return self._tremor + self._push * math.sin(math.pi * self._left / self._length) ** 2


def collect_chain(world: World, seed: int) -> Iterator[Demonstration]:
    """Up to `LIFTS_PER_CHAIN` lifts, the cube put elsewhere while the arm is still up. Ends at a failed lift."""
    rng = np.random.default_rng(seed)
    start = _place_arm(world, seed, rng)
    disturbance = Disturbance(rng) if rng.random() < 0.7 else None
    for _ in range(LIFTS_PER_CHAIN):
        demonstration = _collect_lift(world, seed, start, disturbance)
        if demonstration is None:
            return
        yield demonstration
        start = "chained"
        world.place_cube(int(rng.integers(2**31)))


def collect(directory: Path, *, episodes: int, seed: int, workers: int, command: str) -> int:
    """Collect about `episodes` lifts into a dataset, chains from `seed` on; returns the number of steps.

    Raises DataError, before anything is collected, where the folder holds something.
    """
    check_vacant(directory)
    chains = math.ceil(episodes / LIFTS_PER_CHAIN)
    about = {"command": command, "seed": seed, "chains": chains}
    with multiprocessing.get_context("spawn").Pool(workers, _open_world) as pool:
        lifts = _collected(pool.imap(_collect_job, range(seed, seed + chains)), Progress(chains))
        return write_demonstrations(directory, lifts, INSTRUCTION, about)


def _collected(chains: Iterable[list[Demonstration]], progress: "Progress") -> Iterator[Demonstration]:
    steps = 0
    for chain in chains:
        steps += sum(map(len, chain))
        progress.show(steps)
        yield from chain


class Progress:
    """A live line on stderr: chains done, steps per second, time left."""

    def __init__(self, chains: int) -> None:
        self._chains, self._done, self._began_ns = chains, 0, time.monotonic_ns()

    def show(self, steps: int) -> None:
        """Count one more chain; `steps` are those collected so far."""
        self._done += 1
        elapsed_s = (time.monotonic_ns() - self._began_ns) / 1e9
        left_s = elapsed_s / self._done * (self._chains - self._done)
        line = (
            f"{self._done}/{self._chains} chains  {steps} steps  {steps / elapsed_s:.0f} steps/s  {left_s:.0f} s left "
        )
        print("\r" + line, end="" if self._done < self._chains else "\n", file=sys.stderr, flush=True)


def _place_arm(world: World, seed: int, rng: np.random.Generator) -> str:
    start = str(rng.choice(["home", "random", "near"], p=[0.35, 0.35, 0.30]))
    world.reset(seed, start="home" if start == "home" else "random")
    if start == "near":
        world.set_arm_rad(_near_pose(polar(world.truth().cube_position_m), rng))
    return start


def _near_pose(cube: Grip, rng: np.random.Generator) -> NDArray[np.float64]:
    # Where a poor grasp leaves the jaws: low and beside the cube, or over it and off, closed or open.
    height = rng.uniform(0.015, 0.09)
    clear = 0.0 if height > CLEAR_HEIGHT_M + 0.01 else 0.032
    aside = rng.choice([-1, 1]) * rng.uniform(clear, 0.055)
    radius = cube.radius_m + rng.uniform(-0.035, 0.015)
    return inverse(Grip(radius, cube.azimuth_rad + aside / radius, height), rng.uniform(0.1, OPEN_RAD))


def _collect_lift(world: World, seed: int, start: str, disturbance: Disturbance | None) -> Demonstration | None:
    expert = Expert(world.goal_rad)
    executed = expert.goal_rad
    rows: list[tuple[NDArray[Any], ...]] = []
    rested = 0
    while rested < REST_STEPS:
        if len(rows) == MAX_STEPS:
            return None
        truth, position = world.truth(), world.position_rad
        views = np.stack([world.render(v) for v in VIEWS])
        rows.append((views, position, expert.goal_rad, truth.cube_position_m, np.array(truth.grasped)))
        goal = expert.advance(truth, position)
        disturbed = goal if disturbance is None else goal + disturbance.advance()
        execute(world, executed, disturbed)
        executed = disturbed
        rested = rested + 1 if world.truth().lifted and expert.is_still() else 0
    return _demonstration(rows, seed, start)


def _demonstration(rows: list[tuple[NDArray[Any], ...]], seed: int, start: str) -> Demonstration:
    frames, state, action, cube, grasped = (np.stack(column) for column in zip(*rows, strict=True))
    state, action, cube = (column.astype(np.float32) for column in (state, action, cube))
    contact = grasped & ~np.concatenate([[False], grasped[:-1]])
    return Demonstration(frames, state, action, cube, contact, seed=seed, start=start)


def _open_world() -> None:
    global _world
    _world = World(frame_size=FRAME_SIZE)


def _collect_job(seed: int) -> list[Demonstration]:
    return list(collect_chain(_world, seed))


def main(argv: Sequence[str] | None = None) -> int:
    """Collect demonstrations into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m onbeat.training.demonstrations", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--episodes", type=int, default=480, help="lifts to try, in chains of three that end at a failed one"
    )
    parser.add_argument("--seed", type=int, default=1000, help="the first chain's seed; the next ones count up")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    command = " ".join(["python -m onbeat.training.demonstrations", *arguments])
    steps = collect(options.out, episodes=options.episodes, seed=options.seed, workers=options.workers, command=command)
    print(f"{len(open_dataset(options.out).episodes)} lifts, {steps} steps in {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_module("onbeat.training.demonstrations", main))
