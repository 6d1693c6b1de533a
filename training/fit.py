"""Fitting a policy: one object that owns the weights and takes one optimiser step at a time.

All randomness of step k follows from (seed, k), so that a stopped run goes on as if it had never stopped.
B observations, D draws per observation, C chunk rows, A = 200 unified slots.
"""

import copy
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.prompt import Prompt
from onbeat.training.auxiliary import PlaceHeads, place_loss
from onbeat.training.checkpoint import save_checkpoint
from onbeat.training.dataset import Batch, Steps
from onbeat.training.losses import FlowDistribution, draw_flow_task, flow_loss, warm_up_cosine
from onbeat.training.model.policy import Cache, Policy, create_policy
from onbeat.training.model.sampler import choose_sampler, sample_chunk
from onbeat.training.model.vision import normalise_views
from onbeat.training.recipe import Fitting, Network, Recipe

STATE_FILE = "resume/fit.safetensors"  # not beside the weights: a checkpoint's *.safetensors are all read
RATE_FLOOR = 0.02  # of the peak, at the end of the cosine
BETAS = (0.9, 0.999)
FIRST_VELOCITY = 0.1  # deviations: the decoder starts by saying little rather than something wrong
SEED_STRIDE = 1_000_003  # a prime, so that the streams of neighbouring seeds do not meet
VALIDATION_SEED = -1
VALIDATED = 256  # observations


class ResumeError(OnbeatError):
    """There is nothing to resume, or it belongs to another recipe."""


class Losses(NamedTuple):
    """One step. flow: per counted element, normalised units. place: squared deviations. norm: of the gradient."""

    flow: float
    place: float
    norm: float


class Validation(NamedTuple):
    """flow, place: as in Losses. sampled, recorded: (B, C, A), what the average would do and what was done."""

    flow: float
    place: float
    sampled: Tensor
    recorded: Tensor


def fresh_policy(network: Network, vocabulary: int, seed: int, slots: Tensor) -> Policy:
    """Random weights that keep the variance of what passes, and no weight into or out of slots that no data moves.

    With those at zero, and their inputs zero in training, they stay so: noise in unused slots never reaches an action.
    slots: (A,) bool, the used ones.
    """
    policy = create_policy(network.configure(vocabulary), seed)
    with torch.no_grad():
        for module in policy.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.mul_(module.weight[0].numel() ** -0.5 / module.weight.std())
        policy.action_encoder.W1.weight[:, ~slots] = 0
        policy.action_decoder.layer2.weight[~slots] = 0
        policy.action_decoder.layer2.weight.mul_(FIRST_VELOCITY)
    return policy


class Fit:
    """The state of a run. policy: the weights being fitted; average: their moving average, which is what is written."""

    def __init__(self, recipe: Recipe, policy: Policy, data: Steps, prompt: Prompt, slots: Tensor) -> None:
        self.recipe, self.policy, self.data, self.prompt, self.slots = recipe, policy, data, prompt, slots
        self.average = copy.deepcopy(policy).requires_grad_(False).eval()
        torch.manual_seed(recipe.seed)  # for the auxiliary heads' first weights
        self.places = PlaceHeads(policy.config, prompt, views=data.frames.shape[1])
        self.place_mean, self.place_deviation = data.target_m.mean(0), data.target_m.std(0) + 1e-6
        self.step = 0
        self.optimiser = torch.optim.AdamW(self._groups(), lr=recipe.fitting.peak_rate, betas=BETAS, fused=True)
        config = policy.config
        self.distribution = FlowDistribution(
            config.time.alpha, config.time.scale, config.delay.simulated, config.delay.exponential
        )

    @property
    def fitting(self) -> Fitting:
        return self.recipe.fitting

    def advance(self) -> Losses:
        """One optimiser step."""
        generator = self._generator(self.step)
        batch = self.data.batch(self._indices(self.step), self.policy.config.chunk)
        for group in self.optimiser.param_groups:
            group["lr"] = self.fitting.peak_rate * self._rate()
        self.optimiser.zero_grad(set_to_none=True)
        flow, place = self._losses(self.policy, batch, generator, self.fitting.jitter)
        (flow + self.fitting.auxiliary_weight * place).backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.fitting.clip_norm)
        self.optimiser.step()
        self.step += 1
        self._follow()
        return Losses(flow.item(), place.item(), norm.item())

    @torch.inference_mode()
    def validate(self, held_out: Steps) -> Validation:
        """The average on evenly spaced held-out observations, always the same with the same draws."""
        generator = self._generator(VALIDATION_SEED)
        indices = torch.linspace(0, len(held_out) - 1, min(VALIDATED, len(held_out))).long()
        batch = held_out.batch(indices, self.policy.config.chunk)
        flow, place = self._losses(self.average, batch, generator, jitter=0.0)
        return Validation(flow.item(), place.item(), self.sample(batch, generator), batch.actions)

    @torch.inference_mode()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Chunks (B, C, A) that the average would act by."""
        noise = torch.randn((1, *batch.actions.shape), generator=generator)
        cache = self._encode(self.average, batch, normalise_views(batch.frames))
        return sample_chunk(self.average, cache, choose_sampler(self.average.config), noise).actions

    def save(self, folder: Path) -> None:
        """Write the checkpoint (the average) and all that a resumed run needs, each file whole or not at all."""
        save_checkpoint(self.average, folder)
        path = folder / STATE_FILE
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(self._state(), partial, metadata={"step": str(self.step), "recipe": self.recipe.fingerprint()})
        os.replace(partial, path)

    def resume(self, folder: Path) -> None:
        """Take over what `save` wrote. Raises ResumeError."""
        path = folder / STATE_FILE
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as problem:
            raise ResumeError(f"{path} cannot be read ({problem}): start without --resume") from None
        if metadata["recipe"] != self.recipe.fingerprint():
            raise ResumeError(f"{path} was written by another recipe: restore that one, or start without --resume")
        self._load(tensors)
        self.step = int(metadata["step"])

    def _losses(self, policy: Policy, batch: Batch, generator: torch.Generator, jitter: float) -> tuple[Tensor, Tensor]:
        pixels = jitter_colours(normalise_views(batch.frames), jitter, generator)
        cache = self._encode(policy, batch, pixels)
        valid = self.slots.expand_as(batch.actions)
        task = draw_flow_task(batch.actions, valid, self.fitting.draws, self.distribution, generator)
        flow = flow_loss(policy.velocity(cache, task.noisy, task.bucket), task)
        place = (batch.target_m - self.place_mean) / self.place_deviation
        return flow, place_loss(self.places(cache), place)

    def _encode(self, policy: Policy, batch: Batch, pixels: Tensor) -> Cache:
        ids = torch.from_numpy(self.prompt.token_ids).expand(len(pixels), -1)
        return policy.encode_prefix(pixels, ids, self.prompt.image_start, self.prompt.state_index, batch.state)

    def _indices(self, step: int) -> Tensor:
        """The observations of a step: every one comes once per epoch, in an order of the epoch's own."""
        batch, count = min(self.fitting.batch, len(self.data)), len(self.data)
        per_epoch = count // batch
        order = torch.randperm(count, generator=self._generator(-2 - step // per_epoch))
        start = (step % per_epoch) * batch
        return order[start : start + batch]

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.recipe.seed * SEED_STRIDE + stream) % 2**63)

    def _rate(self) -> float:
        return warm_up_cosine(self.step, warm_up=self.fitting.warm_up_steps, total=self.fitting.steps, floor=RATE_FLOOR)

    @torch.no_grad()
    def _follow(self) -> None:
        # While the run is young an average over all its steps would remember the random start.
        decay = min(self.fitting.ema_decay, (1 + self.step) / (10 + self.step))
        for average, newest in zip(self.average.parameters(), self.policy.parameters(), strict=True):
            average.lerp_(newest, 1 - decay)

    def _groups(self) -> list[dict[str, object]]:
        parameters = [*self.policy.parameters(), *self.places.parameters()]
        decayed = [p for p in parameters if p.ndim >= 2]
        others = [p for p in parameters if p.ndim < 2]
        return [
            {"params": decayed, "weight_decay": self.fitting.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def _state(self) -> dict[str, Tensor]:
        modules = {"policy": self.policy, "average": self.average, "places": self.places}
        tensors = {f"{part}.{name}": t for part, m in modules.items() for name, t in m.state_dict().items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": t for name, t in moments.items()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        for part, module in (("policy", self.policy), ("average", self.average), ("places", self.places)):
            module.load_state_dict(_under(tensors, part))
        state = self.optimiser.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under(tensors, "optimiser").items():
            index, moment = name.split(".", 1)
            moments.setdefault(int(index), {})[moment] = tensor
        self.optimiser.load_state_dict({**state, "state": moments})


def jitter_colours(pixels: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Gain and offset of each image's channels changed by up to `amount`. pixels: (B, V, 3, S, S), normalised."""
    if amount == 0:
        return pixels
    shape = (*pixels.shape[:3], 1, 1)
    gain, offset = (1 + amount * (2 * torch.rand(shape, generator=generator) - 1) for _ in range(2))
    return pixels * gain + (offset - 1)


def _under(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
