"""A dataset in a robot's own numbers: the state it reported, and the chunk of actions that follows, in the kinds that
the policy is to learn.

n rows, C rows of a chunk, D numbers of all action keys, d numbers of one key.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.kinds import from_absolute
from onbeat.embodiment.robot import ABSOLUTE, DELTA_PER_STEP, ActionKey, Embodiment
from onbeat.training.data.columns import Columns, Part
from onbeat.training.data.layout import DataError
from onbeat.training.data.reader import Dataset

RATE_SLACK = 1e-6


@dataclass(frozen=True, slots=True)
class Chunk:
    """Actions by key, (C, d), in the robot's units and rotation forms. inside: (C,) bool, rows within the episode."""

    actions: Mapping[str, NDArray[Any]]
    inside: NDArray[np.bool_]


class RobotData:
    """One dataset read as one robot's. Raises DataError where the dataset's rate does not fit the robot's period.

    Actions recorded as targets become steps or offsets where the embodiment has those (embodiment/kinds.py), against
    the state of the same name.
    """

    def __init__(self, dataset: Dataset, robot: Embodiment, columns: Columns) -> None:
        self.dataset, self.robot, self.columns = dataset, robot, columns
        converted = {key.name for key in robot.action if columns.action[key.name].kind not in (None, key.kind)}
        for key in robot.action:
            _check_kind(key, columns.action[key.name], robot, dataset)
        self.stride = _stride(dataset, robot, converted)
        # Keys that are recorded as they are learnt pass through untouched.
        kept = (key if key.name in converted else replace(key, kind=ABSOLUTE) for key in robot.action)
        self._encoder = replace(robot, action=tuple(kept)) if converted else None

    @property
    def converts(self) -> bool:
        """Whether rows depend on the observation they are learnt from."""
        return self._encoder is not None

    def state(self, episode: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """Rows [start, stop) of every state key: (n, d)."""
        return {name: self._read(part, episode, start, stop) for name, part in self.columns.state.items()}

    def actions(self, episode: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """Rows [start, stop) of every action key as recorded: (n, d)."""
        return {name: self._read(part, episode, start, stop) for name, part in self.columns.action.items()}

    def chunk(self, episode: int, frame: int, rows: int) -> Chunk:
        """The actions due at a frame and after it, one policy period apart; past the end the last row repeats."""
        length = self.dataset.episodes[episode].length
        wanted = frame + self.stride * np.arange(rows)
        taken = np.minimum(wanted, length - 1)
        recorded = self.actions(episode, frame, int(taken[-1]) + 1)
        actions = {name: values[taken - frame] for name, values in recorded.items()}
        return Chunk(self._encode(episode, frame, actions) if self._encoder else actions, wanted < length)

    def _encode(self, episode: int, frame: int, targets: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        assert self._encoder is not None
        reported = self.state(episode, frame, frame + 1)
        observed = np.concatenate([self._reported(key, reported) for key in self._encoder.action])
        before = frame - self.stride
        committed = observed
        if before >= 0:
            committed = self._encoder.flatten(self.actions(episode, before, before + 1))[0]
        rows = from_absolute(self._encoder, self._encoder.flatten(targets), committed=committed, observed=observed)
        kinds = {name: values.dtype for name, values in targets.items()}
        return {name: values.astype(kinds[name]) for name, values in self._encoder.split(rows).items()}

    def _reported(self, key: ActionKey, reported: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        return reported[key.name][0] if key.name in reported and key.kind != ABSOLUTE else np.zeros(key.size)

    def _read(self, part: Part, episode: int, start: int, stop: int) -> NDArray[Any]:
        values = self.dataset.numbers(episode, part.column, start, stop)[:, part.start : part.stop]
        if not np.issubdtype(values.dtype, np.floating):
            values = values.astype(np.float32)
        if part.scale == 1 and part.offset == 0:
            return values
        return (values * part.scale + part.offset).astype(values.dtype)


def _check_kind(key: ActionKey, part: Part, robot: Embodiment, dataset: Dataset) -> None:
    if part.kind in (None, key.kind):
        return
    where = f"{dataset.folder}: action '{key.name}'"
    if part.kind != ABSOLUTE:
        raise DataError(f"{where} is recorded as {part.kind} and {robot.name} has it {key.kind}: record targets")
    state = {known.name: known for known in robot.state}.get(key.name)
    if state is None or state.size != key.size or state.rotation != key.rotation:
        raise DataError(
            f"{where} becomes {key.kind} against the state '{key.name}', which {robot.name} has not: name one"
        )


def _stride(dataset: Dataset, robot: Embodiment, converted: set[str]) -> int:
    """Recorded rows per policy period, a whole number."""
    exact = dataset.info.fps * robot.policy_period_ms / 1000
    stride = round(exact)
    where = f"{dataset.folder} has {dataset.info.fps:g} rows/s and {robot.name} one in {robot.policy_period_ms:g} ms"
    if stride < 1 or abs(exact - stride) > RATE_SLACK * exact:
        raise DataError(f"{where}: record a multiple of that rate, or give the robot another policy_period_ms")
    steps = [key.name for key in robot.action if key.kind == DELTA_PER_STEP and key.name not in converted]
    if stride > 1 and steps:
        raise DataError(f"{where}, and '{steps[0]}' is a step per row: steps cannot be left out, so record that rate")
    return stride
