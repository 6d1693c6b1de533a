"""Rectified flow, with the prefix lock of universal async chunking: what is drawn, what is asked, what is counted.

B observations, D draws of (noise, time, delay) per observation, C chunk rows, A = 200 unified action slots, N tokens of
a text. A loss is a sum over counted entries; dividing by their count over the whole batch, on all processes, is left to
who knows it.
Source: Being-H0.5 (arXiv 2601.12993), eq. 17-19 and the training recipe.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onbeat.training.delays import Delays

CLEAN_BUCKET = 1000  # the time bucket of a row that is given, not sampled
NOT_ASKED = -100  # where no token of a text is asked for


@dataclass(frozen=True, slots=True)
class FlowDistribution:
    """How noise times are drawn: t = (time_scale - u) / time_scale with u ~ Beta(time_alpha, 1), mostly near 0, the
    noise end."""

    time_alpha: float = 1.5
    time_scale: float = 0.999

    def times(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Times in [0, 1], float32. Beta(a, 1) is U^(1/a); a u above time_scale would give t < 0 and becomes 0."""
        uniform = torch.rand(shape, generator=generator)
        return ((self.time_scale - uniform.pow(1 / self.time_alpha)) / self.time_scale).clamp_min(0.0)


class Drawn(NamedTuple):
    """What one step draws for each observation. noise (B, D, C, A) float32, time (B, D) in [0, 1], delay (B, D) int64.

    plain: (B, D) bool, the draws that meet the gate as the sampler's first iteration does, without a correction.
    """

    noise: Tensor
    time: Tensor
    delay: Tensor
    plain: Tensor

    def rows(self, rows: Tensor, device: torch.device) -> "Drawn":
        """Those of some observations, on a device."""
        return Drawn(*(field[rows].to(device) for field in self))


def draw_flow(
    embodiments: Sequence[str],
    size: tuple[int, int, int],
    distribution: FlowDistribution,
    delays: Delays,
    generator: torch.Generator,
) -> Drawn:
    """Of a batch whose robots are `embodiments` (B); size: (D, C, A). No draw is plain."""
    shape = len(embodiments), size[0]
    noise = torch.randn((len(embodiments), *size), generator=generator)
    time = distribution.times(shape, generator)
    delay = delays.draw(embodiments, size[0], generator)
    return Drawn(noise, time, delay, torch.zeros(shape, dtype=torch.bool))


@dataclass(frozen=True, slots=True)
class FlowTask:
    """One batch of questions to the velocity network. noisy, target, counted: (B, D, C, A); bucket: (B, D, C) int64."""

    noisy: Tensor
    target: Tensor
    bucket: Tensor
    counted: Tensor


def flow_task(actions: Tensor, valid: Tensor, moved: Tensor, drawn: Drawn, buckets: int = 1000) -> FlowTask:
    """Noise each chunk D times: x_t = (1 - t) noise + t a, target a - noise, rows below the delay clean.

    actions: (B, C, A) normalised; valid: (B, C, A) bool, what counts. moved: (A,) bool, the slots that any robot of the
    run moves, or (B, 1, 1, A), those of each: the others are 0 in `noisy`, so that no weight ever learns from them.
    """
    clean = actions[:, None]
    given = torch.arange(actions.shape[1], device=actions.device) < drawn.delay[..., None]
    time = drawn.time[..., None].expand(given.shape)
    t = torch.where(given, 1.0, time)[..., None]
    return FlowTask(
        noisy=torch.where(moved, (1 - t) * drawn.noise + t * clean, 0.0),
        target=clean - drawn.noise,
        bucket=torch.where(given, CLEAN_BUCKET, (time * buckets).long()),
        counted=valid[:, None] & ~given[..., None],
    )


def flow_error(velocity: Tensor, task: FlowTask) -> Tensor:
    """Squared error, summed over each observation's counted entries: (B,)."""
    return ((velocity - task.target).square() * task.counted).flatten(1).sum(1)


def text_error(logits: Tensor, answer: Tensor) -> Tensor:
    """Cross entropy, summed over each text's tokens that are asked for: (B,). logits (B, N, W); answer (B, N) int64."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), answer.flatten(), ignore_index=NOT_ASKED, reduction="none")
    return loss.view(answer.shape).sum(1)


def warm_up_cosine(step: int, *, warm_up: int, total: int, floor: float = 0.0) -> float:
    """The factor on the peak learning rate: linear from 1/warm_up to 1, then half a cosine down to `floor`."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, total - warm_up))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(progress * math.pi))
