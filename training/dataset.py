"""Demonstrations as one source of samples, all in memory: frames as bytes, the rest as float32.

N policy steps, V views, S image side, J joints, C chunk rows, A = 200 unified slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.metadata import MERGED, Statistics, measure
from onbeat.embodiment.robot import ABSOLUTE, Embodiment, StateKey
from onbeat.embodiment.slots import UNIFIED_DIM
from onbeat.runtime.language import PolicyLanguage
from onbeat.runtime.prompt import Prompt
from onbeat.training.auxiliary import PLACE
from onbeat.training.data.reader import open_dataset
from onbeat.training.data.sample import Kind, Sample
from onbeat.training.data.sources import action_slots
from onbeat.training.demonstrations import Demonstration, read_demonstrations


class DatasetError(OnbeatError):
    """Demonstrations that do not fit the robot or the network, or are not finite. The text names file and step."""


@dataclass(frozen=True, slots=True)
class Recordings:
    """A folder of demonstrations as read. instruction: what the robot was told in all of them."""

    instruction: str
    demonstrations: tuple[Demonstration, ...]


@dataclass(frozen=True, slots=True)
class Steps:
    """All steps of some demonstrations, one after the other: a `Source`. last: (N,) the index of one's own last step.

    frames (N, V, S, S, 3) uint8, state (N, A), action (N, A) float32 normalised and unified, cube_m (N, 3) float32.
    moved: (A,) bool, the robot's action slots. prompt: of the one instruction, which is `task`.
    """

    frames: NDArray[np.uint8]
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    cube_m: NDArray[np.float32]
    last: NDArray[np.int64]
    moved: NDArray[np.bool_]
    chunk: int
    prompt: Prompt
    embodiment: str
    task: str
    name: str = "demonstrations"
    kind: Kind = "simulation"

    def __len__(self) -> int:
        return len(self.last)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Every step alike."""
        return np.ones(len(self))

    def sample(self, index: int, generator: np.random.Generator) -> Sample:  # noqa: ARG002 (a Source's signature)
        """The step and the chunk that follows; past the end the last row repeats and counts: the robot stays where the
        demonstration left it."""
        rows = np.minimum(index + np.arange(self.chunk), self.last[index])
        return Sample(
            frames=np.moveaxis(self.frames[index], -1, -3),
            state=self.state[index],
            actions=self.action[rows],
            valid=np.broadcast_to(self.moved, (self.chunk, UNIFIED_DIM)),
            prompt=self.prompt,
            embodiment=self.embodiment,
            task=self.task,
            kind=self.kind,
            extra={PLACE: self.cube_m[index]},
        )


def read_recordings(folder: Path, robot: Embodiment, image_size: int) -> Recordings:
    """Read and check a folder. Raises DatasetError or DataError."""
    unmeant = [key.name for key in robot.action if key.kind != ABSOLUTE]
    if unmeant:
        raise DatasetError(f"action '{unmeant[0]}' of {robot.name} is not absolute: train on absolute actions")
    instructions = list(open_dataset(folder).tasks.values())
    if len(instructions) != 1:
        raise DatasetError(f"{folder} has {len(instructions)} tasks: name it under [data] of the recipe instead")
    demonstrations = read_demonstrations(folder)
    for number, demonstration in enumerate(demonstrations):
        check_demonstration(demonstration, f"{folder} episode {number}", robot, image_size)
    return Recordings(instructions[0], tuple(demonstrations))


def check_demonstration(demonstration: Demonstration, where: str, robot: Embodiment, image_size: int) -> None:
    """Raise DatasetError, naming place and step, unless shapes fit and every number is finite."""
    frames = (len(robot.views), image_size, image_size, 3)
    if demonstration.frames.shape[1:] != frames or demonstration.frames.dtype != np.uint8:
        found = f"{demonstration.frames.dtype} {demonstration.frames.shape[1:]}"
        raise DatasetError(f"{where}: frames are {found}, not uint8 {frames}: collect them at image_size")
    _check_rows(f"{where}: state_rad", demonstration.state_rad, _width(robot.state))
    _check_rows(f"{where}: action_rad", demonstration.action_rad, _width(robot.action))
    _check_rows(f"{where}: cube_m", demonstration.cube_m, 3)


def _check_rows(what: str, rows: NDArray[Any], width: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != width:
        raise DatasetError(f"{what} is {rows.shape}, not {width} wide: it is for another robot")
    odd = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if odd.size:
        raise DatasetError(f"{what} is not finite at step {odd[0]}: collect that file again")


def split_recordings(
    demonstrations: Sequence[Demonstration], held_out: float, seed: int
) -> tuple[list[Demonstration], list[Demonstration]]:
    """For fitting, and at least one held out. Whole demonstrations, drawn by `seed`. Raises DatasetError below two."""
    if len(demonstrations) < 2:
        raise DatasetError(f"{len(demonstrations)} demonstration cannot be split: collect at least two")
    count = min(max(1, round(held_out * len(demonstrations))), len(demonstrations) - 1)
    order = np.random.default_rng(seed).permutation(len(demonstrations))
    return [demonstrations[i] for i in sorted(order[count:])], [demonstrations[i] for i in sorted(order[:count])]


def measure_statistics(demonstrations: Sequence[Demonstration], robot: Embodiment, dataset: str) -> Statistics:
    """The statistics that the checkpoint carries, of the fitted demonstrations alone."""
    state = np.concatenate([d.state_rad for d in demonstrations]).astype(np.float64)
    action = np.concatenate([d.action_rad for d in demonstrations]).astype(np.float64)
    return Statistics(
        dataset,
        MERGED,
        {name: measure(values) for name, values in _split(state, robot.state).items()},
        {name: measure(values) for name, values in _split(action, robot.action).items()},
    )


def assemble_steps(demonstrations: Sequence[Demonstration], language: PolicyLanguage, instruction: str) -> Steps:
    """Demonstrations in the network's terms, by the very code that translates for the robot."""
    robot = language.embodiment
    state = np.concatenate([d.state_rad for d in demonstrations])
    action = np.concatenate([d.action_rad for d in demonstrations])
    lengths = np.array([len(d) for d in demonstrations])
    normalised = language.normalise_state(_split(state, robot.state))
    return Steps(
        frames=np.concatenate([d.frames for d in demonstrations]),
        state=_unify(robot.state, normalised),
        action=language.encode(_split(action, robot.action)),
        cube_m=np.concatenate([d.cube_m for d in demonstrations]),
        last=np.repeat(np.cumsum(lengths) - 1, lengths),
        moved=action_slots(robot),
        chunk=language.settings.chunk,
        prompt=language.prompt(instruction),
        embodiment=robot.name,
        task=instruction,
    )


def _width(keys: Sequence[StateKey]) -> int:
    return sum(key.size for key in keys)


def _split(rows: NDArray[Any], keys: Sequence[StateKey]) -> dict[str, NDArray[Any]]:
    stops = np.cumsum([key.size for key in keys])
    return {key.name: rows[:, stop - key.size : stop] for key, stop in zip(keys, stops, strict=True)}


def _unify(keys: Sequence[StateKey], values: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    unified = np.zeros((len(next(iter(values.values()))), UNIFIED_DIM), np.float32)
    for key in keys:
        unified[:, key.start : key.stop] = values[key.name]
    return unified
