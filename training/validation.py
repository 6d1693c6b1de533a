"""How good the average is on what was held out, in the network's units and in the robots'.

G observations of a group, C chunk rows, A = 200 unified slots, d numbers of an action key.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onbeat.runtime.language import PolicyLanguage
from onbeat.training.batch import Group, group_samples
from onbeat.training.data.sample import Source
from onbeat.training.fit import Fit

VALIDATED = 256  # observations, of all sources together


def held_out_groups(sources: Sequence[Source]) -> list[Group]:
    """Evenly spaced observations of each source, always the same; none where nothing is held out."""
    generator = np.random.default_rng(0)
    samples = [
        source.sample(index, generator)
        for source in sources
        for index in torch.linspace(0, len(source) - 1, min(VALIDATED // len(sources), len(source))).long().tolist()
    ]
    return group_samples(samples, torch.arange(len(samples))) if samples else []


def measure_fit(fit: Fit, groups: Sequence[Group], languages: Mapping[str, PolicyLanguage]) -> dict[str, float]:
    """Losses on held-out observations, and the sampled chunks' mean absolute error per robot and action key.

    The errors are in the robot's units (rad for joints), over whole chunks and over their first halves; of one robot
    alone they are called error_KEY, of several error_ROBOT_KEY. Nothing where nothing is held out.
    """
    if not groups:
        return {}
    validation = fit.validate(groups)
    losses = {"flow": validation.flow, "place": validation.place, "text": validation.text}
    figures = {name: loss for name, loss in losses.items() if loss is not None}
    for robot, language in languages.items() if validation.groups else ():
        pairs = [_of_robot(g, s, robot) for g, s in zip(validation.groups, validation.sampled, strict=True)]
        sampled, recorded = (torch.cat(chunks) for chunks in zip(*pairs, strict=True))
        if len(sampled):
            label = "error" if len(languages) == 1 else f"error_{robot}"
            figures |= _errors(label, _decode(sampled, language), _decode(recorded, language))
    return figures


def _of_robot(group: Group, sampled: Tensor, robot: str) -> tuple[Tensor, Tensor]:
    mine = torch.tensor([name == robot for name in group.embodiments])
    return sampled[mine], group.actions[mine]


def _errors(label: str, sampled: Mapping[str, NDArray[Any]], recorded: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for key, values in sampled.items():
        error = np.abs(values - recorded[key])
        figures[f"{label}_{key}"] = float(error.mean())
        figures[f"{label}_{key}_first_half"] = float(error[:, : error.shape[1] // 2].mean())
    return figures


def _decode(chunks: Tensor, language: PolicyLanguage) -> dict[str, NDArray[Any]]:
    """(G, C, A) as {key: (G, C, d)} in the robot's units."""
    decoded = language.decode(chunks.flatten(0, 1).numpy())
    return {key: values.reshape(*chunks.shape[:2], -1) for key, values in decoded.items()}
