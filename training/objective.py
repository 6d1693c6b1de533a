"""What a step asks of the network, and the sums that its answers come to.

B observations of the whole batch, G of a group, D draws per observation, C chunk rows, A = 200 unified slots,
V views, T answer tokens, M directions, E width of the action stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from onbeat.training.auxiliary import PLACE, PlaceQuestion
from onbeat.training.batch import Group
from onbeat.training.colours import Colours, draw_colours
from onbeat.training.config import PolicyConfig
from onbeat.training.delays import Delays
from onbeat.training.losses import (
    NOT_ASKED,
    Drawn,
    FlowDistribution,
    FlowTask,
    draw_flow,
    flow_error,
    flow_task,
    text_error,
)
from onbeat.training.model.experts import Routing, balance_loss
from onbeat.training.model.policy import Cache, Policy, Refine
from onbeat.training.model.sampler import encode_anchor
from onbeat.training.model.understanding import answer_logits
from onbeat.training.model.vision import normalise_views
from onbeat.training.parallel import global_sum
from onbeat.training.recipe import Fitting


class Draws(NamedTuple):
    """All that is random for a batch, the same on every process."""

    colours: Colours | None
    flow: Drawn


@dataclass(frozen=True, slots=True)
class Asked:
    """One group and what is asked of it. pixels: (G, V, 3, S, S) float32, normalised, colours changed."""

    group: Group
    pixels: Tensor
    drawn: Drawn
    task: FlowTask


class Sums(NamedTuple):
    """Errors, or how many entries they are sums over: of each observation of a group (G,), or of a batch, scalars."""

    flow: Tensor
    text: Tensor
    place: Tensor


@dataclass(frozen=True, slots=True)
class Answered:
    """What the network made of a group. routing: None where no layer has experts, or nothing was asked of them."""

    asked: Asked
    errors: Sums
    routing: Routing | None


class Objective:
    """The losses of one run. moved: (A,) bool, the slots that any of its robots moves. views: most of any robot."""

    def __init__(
        self, config: PolicyConfig, fitting: Fitting, moved: Tensor, views: int, place: PlaceQuestion | None
    ) -> None:
        self.config, self.fitting, self.moved, self.views, self.place = config, fitting, moved, views, place
        self.times = FlowDistribution(config.time.alpha, config.time.scale)
        self.delays = Delays(config.delay, fitting.first_share)

    def draw(self, embodiments: Sequence[str], generator: torch.Generator, jitter: float) -> Draws:
        """For observations of these robots (B,)."""
        batch, draws, gate = len(embodiments), self.fitting.draws, self.config.gate
        colours = draw_colours(batch, self.views, jitter, generator)
        size = draws, self.config.chunk, len(self.moved)
        flow = draw_flow(embodiments, size, self.times, self.delays, generator)
        if gate.present:
            plain = torch.rand((batch, draws), generator=generator) < self.fitting.plain_share
            directions = torch.randn((gate.directions, self.config.decoder.und.width), generator=generator)
            flow = flow._replace(plain=plain, directions=directions)
        return Draws(colours, flow)

    def ask(self, group: Group, draws: Draws) -> Asked:
        """Put a group's questions, where the group is."""
        device = group.state.device
        pixels = normalise_views(group.frames.movedim(-3, -1))
        if draws.colours is not None:
            pixels = draws.colours.rows(group.rows, device).apply(pixels)
        drawn = draws.flow.rows(group.rows, device)
        return Asked(group, pixels, drawn, flow_task(group.actions, group.valid, self.moved.to(device), drawn))

    def count(self, asked: Sequence[Asked], *, together: bool = True) -> Sums:
        """How many entries each loss counts, at least 1. together: over all processes."""
        counts = torch.stack([torch.stack([count.sum() for count in self.entries(part)]) for part in asked]).sum(0)
        return Sums(*(global_sum(counts) if together else counts).clamp_min(1))

    def entries(self, asked: Asked) -> Sums:
        """How many entries each observation's errors are sums over."""
        counted = asked.task.counted.flatten(1).sum(1).float()
        return Sums(
            counted,
            (asked.group.answer != NOT_ASKED).sum(1).float(),
            torch.full_like(counted, float(self._asks_place(asked.group))),
        )

    def answer(self, policy: Policy, asked: Asked) -> Answered:
        """The forward pass."""
        zero = asked.group.state.new_zeros(len(asked.group))
        text = self._text_error(policy, asked) if asked.group.answer.shape[1] else zero
        if not bool(asked.group.valid.any()):
            return Answered(asked, Sums(zero, text, zero), None)
        group, task = asked.group, asked.task
        cache = encode(policy, group, asked.pixels)
        refine = training_refine(policy, group.actions, asked.drawn)
        flow = policy.flow(cache, task.noisy, task.bucket, refine)
        place = self.place.error(cache, group.extra[PLACE]) if self.place and self._asks_place(group) else zero
        return Answered(asked, Sums(flow_error(flow.velocity.float(), task), text, place), flow.routing)

    def means(self, answers: Sequence[Answered], counts: Sums) -> Sums:
        """The part of each mean loss that these answers make up, scalars."""
        sums = (torch.cat(errors).sum() for errors in zip(*(answered.errors for answered in answers), strict=True))
        return Sums(*(total / count for total, count in zip(sums, counts, strict=True)))

    def balance(self, answers: Sequence[Answered]) -> Tensor:
        """The part of the load-balancing loss that these answers make up; 0 without experts."""
        experts = self.config.decoder.experts
        if experts is None:
            return self.moved.new_zeros((), dtype=torch.float32)
        routings = [answered.routing for answered in answers if answered.routing is not None]
        use, observations = global_use(routings, self.config.decoder.layers - experts.foundation_layers, experts.count)
        parts = [balance_loss(routing, use / observations).sum() for routing in routings]
        return sum(parts, use.new_zeros(())) / observations

    def weigh(self, means: Sums, balance: Tensor) -> Tensor:
        """One loss of all."""
        fitting, experts = self.fitting, self.config.decoder.experts
        loss = means.flow + fitting.text_weight * means.text + fitting.auxiliary_weight * means.place
        return loss if experts is None else loss + experts.balance_weight * balance

    def _asks_place(self, group: Group) -> bool:
        return self.place is not None and PLACE in group.extra

    def _text_error(self, policy: Policy, asked: Asked) -> Tensor:
        group = asked.group
        answer = group.answer.clamp_min(0)
        where = group.image_start, group.state_index
        return text_error(
            answer_logits(policy, asked.pixels, group.token_ids, *where, group.state, answer), group.answer
        )


def global_use(routings: Sequence[Routing], layers: int, count: int) -> tuple[Tensor, Tensor]:
    """Over all processes: how often each expert was chosen (L, E), and by how many observations, at least 1."""
    device = routings[0].use.device if routings else torch.device("cpu")
    use = sum((routing.use.sum(1) for routing in routings), torch.zeros(layers, count, device=device))
    observations = torch.tensor(float(sum(routing.use.shape[1] for routing in routings)), device=device)
    return global_sum(use), global_sum(observations).clamp_min(1)


def encode(policy: Policy, group: Group, pixels: Tensor) -> Cache:
    """The prefixes of a group."""
    return policy.encode_prefix(pixels, group.token_ids, group.image_start, group.state_index, group.state)


def training_refine(policy: Policy, actions: Tensor, drawn: Drawn) -> Refine | None:
    """The gate as training has it: anchored on what was really done, with directions drawn for the step.

    The draws marked plain pass as the sampler's first iteration does, so that it meets what it was trained on.
    """
    gate, config = policy.mpg, policy.config.gate
    if gate is None or drawn.plain is None:
        return None
    anchor = encode_anchor(policy, actions)[:, None]
    plain = drawn.plain[..., None, None]

    def refine(features: Tensor) -> Tensor:
        gated = gate(
            features,
            anchor,
            drawn.directions,
            strength=config.strength,
            temperature=config.temperature,
            stop_gradient=config.stop_gradient,
        )
        first = gate.project(features) if config.first_pass == "projected" else features
        return torch.where(plain, first, gated.features)

    return refine
