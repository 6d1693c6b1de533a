"""Samples put together for one step: observations whose prefixes have one shape pass the network as one group.

G observations of a group, V views, S image side, N prefix tokens, T longest answer, C chunk rows, A = 200 slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onbeat.runtime.prompt import Prompt
from onbeat.training.data.sample import Sample
from onbeat.training.losses import NOT_ASKED


@dataclass(frozen=True, slots=True)
class Group:
    """Observations with equal numbers of views and tokens.

    rows: (G,) int64, their places in the step's whole batch. frames (G, V, 3, S, S) uint8, token_ids (G, N) int64,
    state (G, A), actions (G, C, A), valid (G, C, A) bool. answer: (G, T) int64, what the understanding stream is to say
    after the prefix, NOT_ASKED past its end; T = 0 where nothing is. extra: more columns (G, ...) that all have.
    """

    rows: Tensor
    frames: Tensor
    token_ids: Tensor
    image_start: int
    state_index: int
    state: Tensor
    actions: Tensor
    valid: Tensor
    answer: Tensor
    extra: Mapping[str, Tensor]
    embodiments: tuple[str, ...]
    tasks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def slots(self) -> Tensor:
        """(G, 1, A) bool: the action slots of each observation's robot."""
        return self.valid.any(1, keepdim=True)

    def to(self, device: torch.device) -> "Group":
        """The same on a device; rows stay on the CPU, where draws are made."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name in ON_DEVICE}
        return replace(self, **moved, extra={name: column.to(device) for name, column in self.extra.items()})

    def take(self, members: Sequence[int]) -> "Group":
        """Some of the observations, by their places in the group."""
        places = torch.tensor(members)
        cut = {name: getattr(self, name)[places] for name in ("rows", *ON_DEVICE)}
        embodiments, tasks = (tuple(names[i] for i in members) for names in (self.embodiments, self.tasks))
        extra = {name: column[places] for name, column in self.extra.items()}
        return replace(self, **cut, extra=extra, embodiments=embodiments, tasks=tasks)


ON_DEVICE = ("frames", "token_ids", "state", "actions", "valid", "answer")


def robots_of(groups: Sequence[Group]) -> list[str]:
    """The embodiment of each observation of a whole batch, in the batch's order: (B,)."""
    rows = torch.cat([group.rows for group in groups]).argsort()
    names = [name for group in groups for name in group.embodiments]
    return [names[row] for row in rows]


def cut_groups(groups: Sequence[Group], parts: int) -> list[list[Group]]:
    """The observations in so many parts, in turn: none is empty where there are as many observations."""
    if parts == 1:
        return [list(groups)]
    first = min(int(group.rows.min()) for group in groups)
    turns = [((group.rows - first) % parts).tolist() for group in groups]
    return [_take_turn(groups, turns, part) for part in range(parts)]


def _take_turn(groups: Sequence[Group], turns: Sequence[Sequence[int]], part: int) -> list[Group]:
    members = ([place for place, turn in enumerate(own) if turn == part] for own in turns)
    return [group.take(own) for group, own in zip(groups, members, strict=True) if own]


def group_samples(samples: Sequence[Sample], rows: Tensor) -> list[Group]:
    """Samples in groups, the group of the first sample first. rows: their places in the step's whole batch."""
    shapes: dict[tuple[object, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        shapes.setdefault(_shape(sample), []).append(index)
    return [_stack([samples[i] for i in members], rows[members]) for members in shapes.values()]


def _shape(sample: Sample) -> tuple[object, ...]:
    prompt: Prompt = sample.prompt
    asked = sample.text is not None
    return sample.frames.shape, len(prompt.token_ids), prompt.image_start, prompt.state_index, asked


def _stack(samples: Sequence[Sample], rows: Tensor) -> Group:
    first = samples[0]
    columns = [name for name in first.extra if all(name in sample.extra for sample in samples)]
    return Group(
        rows=rows,
        frames=_tensor([sample.frames for sample in samples]),
        token_ids=_tensor([sample.prompt.token_ids for sample in samples]),
        image_start=first.prompt.image_start,
        state_index=first.prompt.state_index,
        state=_tensor([sample.state for sample in samples]),
        actions=_tensor([sample.actions for sample in samples]),
        valid=_tensor([sample.valid for sample in samples]),
        answer=_pad([() if sample.text is None else sample.text for sample in samples]),
        extra={name: _tensor([sample.extra[name] for sample in samples]) for name in columns},
        embodiments=tuple(sample.embodiment for sample in samples),
        tasks=tuple(sample.task for sample in samples),
    )


def _tensor(arrays: Sequence[NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def _pad(answers: Sequence[Sequence[int] | NDArray[np.int64]]) -> Tensor:
    padded = torch.full((len(answers), max(len(answer) for answer in answers)), NOT_ASKED)
    for row, answer in zip(padded, answers, strict=True):
        row[: len(answer)] = torch.as_tensor(np.asarray(answer, np.int64))
    return padded
