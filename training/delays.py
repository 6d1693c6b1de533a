"""Delays of universal async chunking in training: how many rows of a chunk are past when it comes.

B observations, D draws per observation. A delay counts policy steps; a chunk's rows below it are given, not asked.
Source: Being-H0.5 (arXiv 2601.12993), eq. 17-19: d ~ pi_e(d) on {0 .. d_max - 1}, per embodiment e.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onbeat.training.config import DelayConfig


@dataclass(frozen=True, slots=True)
class Delays:
    """How delays are drawn. first_share: of a robot with delays of its own, the draws that have delay 0 as at a run's
    start, when there is no chunk to go on from, however long inference takes."""

    config: DelayConfig
    first_share: float = 0.0

    def probabilities(self, embodiment: str) -> Tensor:
        """Of the delays 0 .. d_max - 1: (d_max,) float64, summing to 1."""
        own = torch.tensor(self.config.weights(embodiment), dtype=torch.float64)
        if embodiment not in self.config.robots:
            return own
        first = torch.zeros_like(own)
        first[0] = self.first_share
        return first + (1 - self.first_share) * own

    def draw(self, embodiments: Sequence[str], draws: int, generator: torch.Generator) -> Tensor:
        """(B, D) int64, row b for the robot embodiments[b]."""
        shape = len(embodiments), draws
        if not self.config.robots:
            shared = self.probabilities("").float()
            return torch.multinomial(shared, shape[0] * draws, replacement=True, generator=generator).view(shape)
        table = {name: self.probabilities(name).cumsum(0)[:-1] for name in set(embodiments)}
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return torch.searchsorted(torch.stack([table[name] for name in embodiments]), uniform, right=True)
