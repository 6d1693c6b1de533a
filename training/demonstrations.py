"""Demonstrations: what the expert saw and did, one file per lift, and the command that collects them.

    python -m onbeat.training.demonstrations --episodes 480 --seed 1000 --out DIR --workers 2

Letters: T policy steps, V views, H x W pixels, J joints. What and why: docs/decisions/0010-demonstrations.md.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.twin.world import JOINTS, VIEWS, World
from onbeat.embodiment.errors import OnbeatError
from onbeat.training.expert import CLEAR_HEIGHT_M, OPEN_RAD, POLICY_PERIOD_NS, Expert, Grip, execute, inverse, polar

INSTRUCTION = "lift the red cube"
FORMAT, VERSION = "onbeat-demonstrations", 1
FRAME_SIZE = (112, 112)
LIFTS_PER_CHAIN = 3
REST_STEPS = 5  # held still at the end of a lift
MAX_STEPS = 150


class DemonstrationsError(OnbeatError):
    """A folder or file of demonstrations that cannot be used."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One lift, policy step k at time t_k.

    frames: (T, V, H, W, 3) uint8, as seen at t_k. state_rad: (T, J) float32, measured at t_k. action_rad: (T, J)
    float32, the expert's goal due at t_k, free of the disturbance that was executed with it. cube_m: (T, 3) float32,
    for analysis and for auxiliary losses in training only. start: "home", "random", "near" (beside the cube) or
    "chained" (the arm as the lift before left it).
    At the last step the expert holds still: a chunk that reaches beyond it repeats the last row.
    """

    frames: NDArray[np.uint8]
    state_rad: NDArray[np.float32]
    action_rad: NDArray[np.float32]
    cube_m: NDArray[np.float32]
    seed: int
    start: str

    def __len__(self) -> int:
        return len(self.state_rad)


def save(demonstration: Demonstration, path: Path) -> None:
    """Write one file, lightly compressed: flat colours shrink a lot."""
    np.savez_compressed(
        path,
        frames=demonstration.frames,
        state_rad=demonstration.state_rad,
        action_rad=demonstration.action_rad,
        cube_m=demonstration.cube_m,
        seed=demonstration.seed,
        start=demonstration.start,
    )


def load(path: Path) -> Demonstration:
    """Read one file. Raises DemonstrationsError when it is truncated, incomplete or of unequal lengths."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            demonstration = Demonstration(
                frames=arrays["frames"],
                state_rad=arrays["state_rad"],
                action_rad=arrays["action_rad"],
                cube_m=arrays["cube_m"],
                seed=int(arrays["seed"]),
                start=str(arrays["start"]),
            )
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as failure:
        raise DemonstrationsError(f"{path} is no demonstration ({failure}): collect the folder again") from failure
    lengths = {len(demonstration), *map(len, (demonstration.frames, demonstration.action_rad, demonstration.cube_m))}
    if len(lengths) != 1 or demonstration.frames.ndim != 5 or demonstration.frames.shape[1] != len(VIEWS):
        raise DemonstrationsError(f"{path} has arrays of lengths {sorted(lengths)}: collect the folder again")
    return demonstration


def load_all(directory: Path) -> list[Demonstration]:
    """Every demonstration of a folder, in the order of its index. Raises DemonstrationsError."""
    return [load(directory / name) for name in read_index(directory)["files"]]


def read_index(directory: Path) -> dict[str, Any]:
    """The folder's index: format, version, command, seed, instruction, joints, views, period_ns, files, steps.

    Raises DemonstrationsError when it is missing, of another format or version, or names a file that is not there.
    """
    path = directory / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise DemonstrationsError(
            f"{directory} holds no readable index.json ({failure}): run `python -m onbeat.training.demonstrations`"
        ) from failure
    if not isinstance(index, dict) or (index.get("format"), index.get("version")) != (FORMAT, VERSION):
        raise DemonstrationsError(f"{path} is not {FORMAT} version {VERSION}: collect the folder again")
    missing = [name for name in index.get("files", []) if not (directory / name).is_file()]
    if missing:
        raise DemonstrationsError(f"{directory} lacks {missing[0]} ({len(missing)} in all): collect the folder again")
    return index


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


def collect(directory: Path, *, episodes: int, seed: int, workers: int, command: str) -> dict[str, Any]:
    """Collect about `episodes` lifts into a folder, chains from `seed` on; returns the index it wrote."""
    directory.mkdir(parents=True, exist_ok=True)
    chains = math.ceil(episodes / LIFTS_PER_CHAIN)
    jobs = [(directory, seed + chain) for chain in range(chains)]
    progress = Progress(chains)
    files: list[str] = []
    steps = 0
    with multiprocessing.get_context("spawn").Pool(workers, _open_world) as pool:
        for names, chain_steps in pool.imap(_collect_job, jobs):
            files += names
            steps += chain_steps
            progress.show(steps)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "command": command,
        "seed": seed,
        "chains": chains,
        "instruction": INSTRUCTION,
        "joints": JOINTS,
        "views": VIEWS,
        "period_ns": POLICY_PERIOD_NS,
        "steps": steps,
        "files": files,
    }
    (directory / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index


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
        rows.append((np.stack([world.render(v) for v in VIEWS]), position, expert.goal_rad, truth.cube_position_m))
        goal = expert.advance(truth, position)
        disturbed = goal if disturbance is None else goal + disturbance.advance()
        execute(world, executed, disturbed)
        executed = disturbed
        rested = rested + 1 if world.truth().lifted and expert.is_still() else 0
    return _demonstration(rows, seed, start)


def _demonstration(rows: list[tuple[NDArray[Any], ...]], seed: int, start: str) -> Demonstration:
    frames, state, action, cube = (np.stack(column) for column in zip(*rows, strict=True))
    single = [column.astype(np.float32) for column in (state, action, cube)]
    return Demonstration(frames, *single, seed=seed, start=start)


def _open_world() -> None:
    global _world
    _world = World(frame_size=FRAME_SIZE)


def _collect_job(job: tuple[Path, int]) -> tuple[list[str], int]:
    directory, seed = job
    names, steps = [], 0
    for number, demonstration in enumerate(collect_chain(_world, seed)):
        names.append(f"lift_{seed:06d}_{number}.npz")
        save(demonstration, directory / names[-1])
        steps += len(demonstration)
    return names, steps


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
    index = collect(options.out, episodes=options.episodes, seed=options.seed, workers=options.workers, command=command)
    print(f"{len(index['files'])} lifts, {index['steps']} steps in {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
