"""Rectified flow, with the prefix lock of universal async chunking: what is drawn, what is asked, what is counted.

B observations, D draws of (noise, time, delay) per observation, C chunk rows, A = 200 unified action slots.
Source: Being-H0.5 (arXiv 2601.12993), eq. 17-19 and the training recipe.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CLEAN_BUCKET = 1000  # the time bucket of a row that is given, not sampled


@dataclass(frozen=True, slots=True)
class FlowDistribution:
    """How noise times and prefix delays are drawn.

    Time t = (time_scale - u) / time_scale with u ~ Beta(time_alpha, 1): mostly near 0, the noise end. Delay d in
    [0, delays), uniform or with weight exp(delays - 1 - d); `delays` 0 or 1 never gives a prefix.
    """

    time_alpha: float = 1.5
    time_scale: float = 0.999
    delays: int = 0
    delay_exponential: bool = True
    buckets: int = 1000

    def times(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Times in [0, 1], float32. Beta(a, 1) is U^(1/a); a u above time_scale would give t < 0 and becomes 0."""
        uniform = torch.rand(shape, generator=generator)
        return ((self.time_scale - uniform.pow(1 / self.time_alpha)) / self.time_scale).clamp_min(0.0)

    def delay_weights(self) -> Tensor:
        """Probability of each delay, (max(delays, 1),), summing to 1."""
        d = torch.arange(max(self.delays, 1), dtype=torch.float32)
        return torch.softmax(-d, 0) if self.delay_exponential else torch.full_like(d, 1 / len(d))

    def delays_of(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Delays in policy steps, int64."""
        count = int(torch.Size(shape).numel())
        return torch.multinomial(self.delay_weights(), count, replacement=True, generator=generator).view(shape)


@dataclass(frozen=True, slots=True)
class FlowTask:
    """One batch of questions to the velocity network. noisy, target, counted: (B, D, C, A); bucket: (B, D, C) int64."""

    noisy: Tensor
    target: Tensor
    bucket: Tensor
    counted: Tensor


def draw_flow_task(
    actions: Tensor, valid: Tensor, draws: int, distribution: FlowDistribution, generator: torch.Generator
) -> FlowTask:
    """Noise each chunk `draws` times: x_t = (1 - t) noise + t a, target a - noise, rows below the delay clean.

    actions: (B, C, A) normalised; valid: (B, C, A) bool, the slots and rows that count. Slots that are not valid are 0
    in `noisy`, so that no weight ever learns from them.
    """
    batch, chunk, slots = actions.shape
    noise = torch.randn((batch, draws, chunk, slots), generator=generator)
    time = distribution.times((batch, draws), generator)[..., None].expand(batch, draws, chunk)
    given = torch.arange(chunk) < distribution.delays_of((batch, draws), generator)[..., None]
    return flow_task(actions, valid, noise, time, given, distribution.buckets)


def flow_task(
    actions: Tensor, valid: Tensor, noise: Tensor, time: Tensor, given: Tensor, buckets: int = 1000
) -> FlowTask:
    """The pure part of `draw_flow_task`. noise: (B, D, C, A); time: (B, D, C) in [0, 1]; given: (B, D, C) bool."""
    clean, usable = actions[:, None], valid[:, None].expand_as(noise)
    t = torch.where(given, 1.0, time)[..., None]
    return FlowTask(
        noisy=torch.where(usable, (1 - t) * noise + t * clean, 0.0),
        target=clean - noise,
        bucket=torch.where(given, CLEAN_BUCKET, (time * buckets).long()),
        counted=usable & ~given[..., None],
    )


def flow_loss(velocity: Tensor, task: FlowTask) -> Tensor:
    """Mean squared error over the counted elements, a scalar; 0 with a zero gradient when nothing is counted."""
    squared = (velocity - task.target).square() * task.counted
    return squared.sum() / task.counted.sum().clamp_min(1)


def warm_up_cosine(step: int, *, warm_up: int, total: int, floor: float = 0.0) -> float:
    """The factor on the peak learning rate: linear from 1/warm_up to 1, then half a cosine down to `floor`."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, total - warm_up))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(progress * math.pi))
