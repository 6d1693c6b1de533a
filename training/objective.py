"""What a step asks of the network, and the sums that its answers come to.

B observations of the whole batch, G of a group, D draws per observation, C chunk rows, A = 200 unified slots,
V views, T answer tokens, M directions, E width of the action stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
from onbeat.training.model.packing import stack
from onbeat.training.model.policy import Cache, Flow, Policy, Prefix, Refine
from onbeat.training.model.sampler import encode_anchor
from onbeat.training.model.understanding import answer_logits
from onbeat.training.model.vision import normalise_views
from onbeat.training.parallel import global_sum
from onbeat.training.recipe import Fitting


class Draws(NamedTuple):
    """All that is random for a batch, the same on every process. directions: (M, H) raw, of the gate's cost."""

    colours: Colours | None
    flow: Drawn
    directions: Tensor


@dataclass(frozen=True, slots=True)
class Asked:
    """One group and what is asked of it. acts: whether it is asked for actions at all, and not for words alone."""

    group: Group
    prefix: Prefix
    drawn: Drawn
    task: FlowTask
    directions: Tensor
    acts: bool


class Sums(NamedTuple):
    """Errors, or how many entries they are sums over: of each observation (B,), or of a batch, scalars."""

    flow: Tensor
    text: Tensor
    place: Tensor


@dataclass(frozen=True, slots=True)
class Answered:
    """What one pass made of some groups, those that act first. errors, entries: of the B observations.

    routing: of the first ones, those that act; None where no layer has experts.
    """

    groups: tuple[Group, ...]
    errors: Sums
    entries: Sums
    routing: Routing | None


class Objective:
    """The losses of one run. moved: (A,) bool, the slots that any of its robots moves. views: most of any robot.

    asks_words: whether any of its sources asks the understanding stream.
    """

    def __init__(
        self,
        config: PolicyConfig,
        fitting: Fitting,
        *,
        moved: Tensor,
        views: int,
        place: PlaceQuestion | None = None,
        asks_words: bool = False,
    ) -> None:
        self.config, self.fitting, self.moved, self.views = config, fitting, moved, views
        self.place, self.asks_words = place, asks_words
        self.times = FlowDistribution(config.time.alpha, config.time.scale)
        self.delays = Delays(config.delay, fitting.first_share)

    def draw(self, embodiments: Sequence[str], generator: torch.Generator, jitter: float) -> Draws:
        """For observations of these robots (B,)."""
        batch, draws, gate = len(embodiments), self.fitting.draws, self.config.gate
        colours = draw_colours(batch, self.views, jitter, generator)
        size = draws, self.config.chunk, len(self.moved)
        flow = draw_flow(embodiments, size, self.times, self.delays, generator)
        if not gate.present:
            return Draws(colours, flow, torch.empty(0))
        plain = torch.rand((batch, draws), generator=generator) < self.fitting.plain_share
        directions = torch.randn((gate.directions, self.config.decoder.und.width), generator=generator)
        return Draws(colours, flow._replace(plain=plain), directions)

    def ask(self, group: Group, draws: Draws) -> Asked:
        """Put a group's questions, where the group is."""
        device = group.state.device
        pixels = normalise_views(group.frames.movedim(-3, -1))
        if draws.colours is not None:
            pixels = draws.colours.rows(group.rows, device).apply(pixels)
        prefix = Prefix(pixels, group.token_ids, group.image_start, group.state_index, group.state)
        drawn = draws.flow.rows(group.rows, device)
        moved = self.moved if self.config.idle_slots == "noise" else group.slots[:, None]
        task = flow_task(group.actions, group.valid, moved, drawn)
        return Asked(group, prefix, drawn, task, draws.directions.to(device), bool(group.valid.any()))

    def count(self, asked: Sequence[Asked], *, together: bool = True) -> Sums:
        """How many entries each loss counts, at least 1. together: over all processes."""
        counts = torch.stack([entries.sum() for entries in self.entries(asked)])
        return Sums(*(global_sum(counts) if together else counts).clamp_min(1))

    def entries(self, asked: Sequence[Asked]) -> Sums:
        """How many entries each observation's errors are sums over."""
        return Sums(
            torch.cat([part.task.counted.flatten(1).sum(1) for part in asked]).float(),
            torch.cat([(part.group.answer != NOT_ASKED).sum(1) for part in asked]).float(),
            torch.cat([part.group.state.new_full((len(part.group),), self._asks_place(part)) for part in asked]),
        )

    def answer(self, policy: Policy, asked: Sequence[Asked]) -> Answered:
        """The forward pass, all groups in one: processes that share the weights must all make the same passes."""
        ordered = sorted(asked, key=lambda part: not part.acts)
        acting = [part for part in ordered if part.acts] or ordered
        caches = policy.encode_prefixes([part.prefix for part in acting])
        flow, place = self._flow(policy, acting, caches), self._places(acting, caches)
        rest = sum(len(part.group) for part in ordered[len(acting) :])
        error = flow_error(flow.velocity.float(), _join([part.task for part in acting]))
        errors = Sums(F.pad(error, (0, rest)), self._texts(policy, ordered), F.pad(place, (0, rest)))
        return Answered(tuple(part.group for part in ordered), errors, self.entries(ordered), flow.routing)

    def means(self, answered: Answered, counts: Sums) -> Sums:
        """The part of each mean loss that these answers make up, scalars."""
        return Sums(*(errors.sum() / count for errors, count in zip(answered.errors, counts, strict=True)))

    def balance(self, routing: Routing | None) -> Tensor:
        """This process's part of the load-balancing loss of one pass; 0 without experts."""
        if routing is None:
            return self.moved.new_zeros((), dtype=torch.float32)
        observations = global_sum(torch.tensor(float(routing.use.shape[1]), device=routing.use.device))
        use = global_sum(routing.use.sum(1)) / observations
        return balance_loss(routing, use).sum() / observations

    def weigh(self, means: Sums, balance: Tensor) -> Tensor:
        """One loss of all."""
        fitting, experts = self.fitting, self.config.decoder.experts
        loss = means.flow + fitting.text_weight * means.text + fitting.auxiliary_weight * means.place
        return loss if experts is None else loss + experts.balance_weight * balance

    def _flow(self, policy: Policy, acting: Sequence[Asked], caches: Sequence[Cache]) -> Flow:
        noisy, bucket = (stack([getattr(part.task, name) for part in acting]) for name in ("noisy", "bucket"))
        if policy.mpg is None:
            return policy.flows(caches, noisy, bucket)
        actions, plain = stack([part.group.actions for part in acting]), stack([part.drawn.plain for part in acting])
        return policy.flows(caches, noisy, bucket, training_refine(policy, actions, plain, acting[0].directions))

    def _places(self, acting: Sequence[Asked], caches: Sequence[Cache]) -> Tensor:
        """The error of the object's place: (B,)."""
        errors = [part.group.state.new_zeros(len(part.group)) for part in acting]
        for index, (part, cache) in enumerate(zip(acting, caches, strict=True)):
            if self.place is not None and self._asks_place(part):
                errors[index] = self.place.error(cache, part.group.extra[PLACE])
        return torch.cat(errors)

    def _texts(self, policy: Policy, asked: Sequence[Asked]) -> Tensor:
        """The error of the words: (B,). Where the run asks for words, one observation at least makes the pass."""
        errors = [part.group.state.new_zeros(len(part.group)) for part in asked]
        if self.asks_words:
            spoken = [index for index, part in enumerate(asked) if part.group.answer.shape[1]] or [0]
            answers = [_or_silent(asked[index].group.answer) for index in spoken]
            logits = answer_logits(
                policy, [asked[i].prefix for i in spoken], [answer.clamp_min(0) for answer in answers]
            )
            for index, answer, said in zip(spoken, answers, logits, strict=True):
                errors[index] = text_error(said, answer)
        return torch.cat(errors)

    def _asks_place(self, asked: Asked) -> bool:
        return self.place is not None and PLACE in asked.group.extra


def _or_silent(answer: Tensor) -> Tensor:
    """An answer of one token that is not asked for where there is none: (G, 1)."""
    return answer if answer.shape[1] else answer.new_full((len(answer), 1), NOT_ASKED)


def _join(tasks: Sequence[FlowTask]) -> FlowTask:
    return FlowTask(*(stack([getattr(task, name) for task in tasks]) for name in FlowTask.__dataclass_fields__))


def training_refine(policy: Policy, actions: Tensor, plain: Tensor, directions: Tensor) -> Refine:
    """The gate as training has it: anchored on what was really done (B, C, A), with directions drawn for the step.

    The draws marked plain (B, D) pass as the sampler's first iteration does, so that it meets what it was trained on.
    """
    gate, config = policy.mpg, policy.config.gate
    assert gate is not None, "the checkpoint has no gate"
    anchor = encode_anchor(policy, actions)[:, None]

    def refine(features: Tensor) -> Tensor:
        gated = gate(
            features,
            anchor,
            directions,
            strength=config.strength,
            temperature=config.temperature,
            stop_gradient=config.stop_gradient,
        )
        first = gate.project(features) if config.first_pass == "projected" else features
        return torch.where(plain[..., None, None], first, gated.features)

    return refine
