"""Fitting a policy: one object that owns the weights and takes one optimiser step at a time.

All randomness of step k follows from (seed, k), so that a stopped run goes on as if it had never stopped.
B observations, C chunk rows, A = 200 unified slots.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onbeat.training.batch import Group, cut_groups, robots_of
from onbeat.training.checkpoint import save_checkpoint
from onbeat.training.config import PolicyConfig
from onbeat.training.feed import Feed, stream
from onbeat.training.freezing import decays, freeze
from onbeat.training.losses import warm_up_cosine
from onbeat.training.model.policy import Policy
from onbeat.training.model.sampler import choose_sampler, sample_chunk
from onbeat.training.model.vision import normalise_views
from onbeat.training.objective import Answered, Asked, Objective
from onbeat.training.parallel import clip_gradients, follow, gather, global_sum, leave_untouched, rank, shard, whole
from onbeat.training.recipe import Fitting, Recipe
from onbeat.training.recompute import recompute_layers
from onbeat.training.resume import load_state, save_state

RATE_FLOOR = 0.02  # of the peak, at the end of the cosine
BETAS = (0.9, 0.999)
VALIDATION_SEED = -1


class Losses(NamedTuple):
    """One step. flow: per counted entry, normalised units. text: nats per token. place: squared deviations.

    balance: of the routers, 1 where experts are used evenly. norm: of the gradient.
    """

    flow: float
    text: float
    place: float
    balance: float
    norm: float


class Validation(NamedTuple):
    """flow, text, place: as in Losses, None where nothing held out is asked for it. groups: those that ask for actions,
    and what the average would do in them, (G, C, A) each."""

    flow: float | None
    text: float | None
    place: float | None
    groups: Sequence[Group]
    sampled: Sequence[Tensor]


class Fit:
    """The state of a run. policy: the weights being fitted; average: their moving average, which is what is written."""

    def __init__(self, recipe: Recipe, policy: Policy, feed: Feed, objective: Objective) -> None:
        self.recipe, self.feed, self.objective = recipe, feed, objective
        self.device, self.step, self.answers = torch.device(recipe.fitting.device), 0, list[Answered]()
        self.policy = policy.to(self.device)
        self.average = copy.deepcopy(policy).requires_grad_(False).eval()
        freeze(self.policy, recipe.frozen)
        if recipe.fitting.recompute:
            recompute_layers(self.policy)
        for module in self._modules().values():
            shard(module)
        self.optimiser = torch.optim.AdamW(self._groups(), lr=recipe.fitting.peak_rate, betas=BETAS, fused=True)

    @property
    def fitting(self) -> Fitting:
        return self.recipe.fitting

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        factor = warm_up_cosine(
            self.step, warm_up=self.fitting.warm_up_steps, total=self.fitting.steps, floor=RATE_FLOOR
        )
        return self.fitting.peak_rate * factor

    def advance(self) -> Losses:
        """One optimiser step; `answers` has what it was made of."""
        self.answers.clear()
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate
        self.optimiser.zero_grad(set_to_none=True)
        losses = self._backward(self._ask())
        leave_untouched(self.policy)
        norm = clip_gradients(self._trained(), self.fitting.clip_norm)
        self.optimiser.step()
        self.step += 1
        follow(self.average, self.policy, self._decay())
        flow, text, place, balance = global_sum(losses).tolist()
        return Losses(flow, text, place, balance, norm.item())

    @torch.no_grad()
    def validate(self, groups: Sequence[Group]) -> Validation:
        """The average on held-out observations, always with the same draws; every process takes all of them."""
        generator = stream(self.recipe.seed, VALIDATION_SEED)
        draws = self.objective.draw(robots_of(groups), generator, jitter=0.0)
        with whole(self.average):
            asked = [self.objective.ask(group.to(self.device), draws) for group in groups]
            answered, counts = self._answer(self.average, asked), self.objective.count(asked, together=False)
            acting = [group for group, part in zip(groups, asked, strict=True) if part.acts]
            sampled = [self.sample(group, generator) for group in acting]
        means = zip(self.objective.means(answered, counts), answered.entries, strict=True)
        flow, text, place = (mean.item() if entries.any() else None for mean, entries in means)
        return Validation(flow, text, place, acting, sampled)

    @torch.no_grad()
    def sample(self, group: Group, generator: torch.Generator) -> Tensor:
        """Chunks (G, C, A) that the average would act by."""
        group = group.to(self.device)
        sampler = choose_sampler(self.average.config)
        noise = torch.randn((sampler.iterations, *group.actions.shape), generator=generator).to(self.device)
        pixels = normalise_views(group.frames.movedim(-3, -1))
        cache = self.average.encode_prefix(pixels, group.token_ids, group.image_start, group.state_index, group.state)
        return sample_chunk(self.average, cache, sampler, noise, slots=group.slots).actions.cpu()

    def save(self, folder: Path) -> None:
        """Write the checkpoint (the average) and all that a resumed run needs, each file whole or not at all."""
        weights = gather(self.average.state_dict())
        if rank() == 0:
            save_checkpoint(whole_policy(self.average.config, weights), folder)
        metadata = {"step": str(self.step), "recipe": self.recipe.fingerprint()}
        save_state(folder, self._modules(), self.optimiser, metadata)

    def resume(self, folder: Path) -> None:
        """Take over what `save` wrote. Raises ResumeError."""
        self.step = int(load_state(folder, self._modules(), self.optimiser, self.recipe.fingerprint())["step"])

    def _ask(self) -> list[list[Asked]]:
        """The questions of the step, in as many parts as gradients are accumulated over."""
        generator = stream(self.recipe.seed, self.step)
        draws = self.objective.draw(self.feed.embodiments(self.step), generator, self.fitting.jitter)
        groups = [group.to(self.device) for group in self.feed.groups(self.step)]
        return [[self.objective.ask(g, draws) for g in part] for part in cut_groups(groups, self.fitting.accumulate)]

    def _backward(self, parts: Sequence[Sequence[Asked]]) -> Tensor:
        """Add up the gradients; returns this process's part of flow, text, place and balance: (4,)."""
        counts = self.objective.count([asked for part in parts for asked in part])
        losses = torch.zeros(4, device=self.device)
        for part in parts:
            answered = self._answer(self.policy, part)
            means = self.objective.means(answered, counts)
            balance = self.objective.balance(answered.routing) / len(parts)
            self.objective.weigh(means, balance).backward()
            losses += torch.stack([*means, balance]).detach()
            self.answers.append(answered)
        return losses

    def _answer(self, policy: Policy, asked: Sequence[Asked]) -> Answered:
        half = self.fitting.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            return self.objective.answer(policy, asked)

    def _decay(self) -> float:
        # While the run is young an average over all its steps would remember the random start.
        return min(self.fitting.ema_decay, (1 + self.step) / (10 + self.step))

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def _groups(self) -> list[dict[str, object]]:
        named = [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]
        decayed = [p for name, p in named if decays(name, p, self.policy.config)]
        others = [p for name, p in named if not decays(name, p, self.policy.config)]
        if self.objective.place is not None:
            places = list(self.objective.place.parameters())
            decayed += [p for p in places if p.ndim >= 2]
            others += [p for p in places if p.ndim < 2]
        return [
            {"params": decayed, "weight_decay": self.fitting.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def _modules(self) -> dict[str, nn.Module]:
        places = {} if self.objective.place is None else {"places": self.objective.place}
        return {"policy": self.policy, "average": self.average, **places}


def whole_policy(config: PolicyConfig, weights: Mapping[str, Tensor]) -> Policy:
    """A policy that owns these weights."""
    with torch.device("meta"):
        policy = Policy(config)
    policy.load_state_dict(dict(weights), assign=True)
    return policy
