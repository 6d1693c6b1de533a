"""The cached network against a naive one: no cache, every token of the sequence recomputed at every flow step.

The naive one reads the published tensor names, loops over heads, and writes the softmax and the sorting of the sliced
Wasserstein distance out. It shares nothing with the network but the vision tower. All in float64, save the
phases: float32 is part of the rules there, and its rounding alone can move actions by 1e-5.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onbeat.runtime.engine import PolicyInputs
from onbeat.training.checkpoint import publish_name
from onbeat.training.config import DecoderConfig, StreamConfig
from onbeat.training.model import decoder as decoder_module
from onbeat.training.model.adapters import SlotAdapter
from onbeat.training.model.decoder import Layer, RoutedStream
from onbeat.training.model.experts import Route, Router
from onbeat.training.model.policy import Policy
from onbeat.training.model.vision import normalise_views
from onbeat.training.random_checkpoint import random_config, random_policy
from onbeat.training.torch_engine import build_engine

TOLERANCE = 1e-5  # on actions near 1
VOCABULARY = 60

Function = Callable[..., Any]
ACTIVATION: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@dataclass(frozen=True, slots=True)
class Naive:
    """The published tensors in float64, and the rules."""

    policy: Policy
    tensors: Mapping[str, Tensor]
    und: Tensor  # (N - 1, und width), all before the actions but the state
    state: Tensor  # (gen width,)
    state_index: int

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.tensors.get(f"{name}.bias")
        product = x @ self.tensors[f"{name}.weight"].T
        product = product if bias is None else product + bias
        return product + self.adapt(name, x) if f"{name}.adapter.weight" in self.tensors else product

    def adapt(self, name: str, x: Tensor) -> Tensor:
        """What the slots' adapters add, slot by slot."""
        rows, offsets = self.tensors[f"{name}.adapter.weight"], self.tensors.get(f"{name}.adapter.bias")
        if offsets is None:
            return sum((x[..., slot, None] * row for slot, row in enumerate(rows)), torch.zeros(()))
        return torch.stack([x @ row + offset for row, offset in zip(rows, offsets, strict=True)], -1)

    def norm(self, name: str, x: Tensor, stream: StreamConfig) -> Tensor:
        root = torch.sqrt((x * x).mean(-1, keepdim=True) + stream.norm_epsilon)
        return x / root * self.tensors[f"{name}.weight"]

    def encode_actions(self, actions: Tensor, buckets: list[int]) -> Tensor:
        half = self.policy.config.decoder.gen.width // 2
        frequencies = torch.exp(torch.arange(half) * (-math.log(1e4) / half))
        phases = [(bucket * frequencies).double() for bucket in buckets]
        times = torch.stack([torch.cat([phase.sin(), phase.cos()]) for phase in phases])
        joined = torch.cat([self.linear("action_encoder.W1", actions), times], -1)
        return self.linear("action_encoder.W3", ACTIVATION["silu"](self.linear("action_encoder.W2", joined)))

    def velocity(self, features: Tensor) -> Tensor:
        decoder = self.policy.config.decoder
        before, after = self.und[: self.state_index], self.und[self.state_index :]
        tokens = [*before, self.state, *after, *features]
        is_gen = [n == self.state_index or n >= len(self.und) + 1 for n in range(len(tokens))]
        for layer in range(decoder.layers):
            tokens = self.layer(f"language_model.model.layers.{layer}", tokens, is_gen)
        out = self.norm("language_model.model.norm_mot_gen", torch.stack(tokens[len(self.und) + 1 :]), decoder.gen)
        return self.linear("action_decoder.layer2", self.linear("action_decoder.layer1", out).clamp(min=0))

    def layer(self, name: str, tokens: list[Tensor], is_gen: list[bool]) -> list[Tensor]:
        decoder = self.policy.config.decoder
        streams = [(decoder.gen, "_mot_gen") if gen else (decoder.und, "") for gen in is_gen]
        queries, keys, values = [], [], []
        for position, (x, (stream, suffix)) in enumerate(zip(tokens, streams, strict=True)):
            normed = self.norm(f"{name}.input_layernorm{suffix}", x, stream)
            q, k, v = (
                self.linear(f"{name}.self_attn.{p}_proj{suffix}", normed).view(-1, decoder.head_dim) for p in "qkv"
            )
            queries.append(turn(self.norm(f"{name}.self_attn.q_norm{suffix}", q, stream), position, decoder))
            keys.append(turn(self.norm(f"{name}.self_attn.k_norm{suffix}", k, stream), position, decoder))
            values.append(v)
        attended = attend_by_hand(torch.stack(queries), torch.stack(keys), torch.stack(values))
        result = []
        for x, a, (stream, suffix) in zip(tokens, attended, streams, strict=True):
            x = x + self.linear(f"{name}.self_attn.o_proj{suffix}", a)
            normed = self.norm(f"{name}.post_attention_layernorm{suffix}", x, stream)
            if f"{name}.router{suffix}.weight" in self.tensors and len(result) > len(self.und):
                last = self.norm(f"{name}.input_layernorm", tokens[len(self.und)], decoder.und)
                result.append(x + self.mix(name, normed, last))
            else:
                result.append(x + self.feed_forward(f"{name}.mlp{suffix}", normed, stream))
        return result

    def feed_forward(self, name: str, x: Tensor, stream: StreamConfig) -> Tensor:
        gate = ACTIVATION[stream.activation](self.linear(f"{name}.gate_proj", x))
        return self.linear(f"{name}.down_proj", gate * self.linear(f"{name}.up_proj", x))

    def mix(self, name: str, x: Tensor, last: Tensor) -> Tensor:
        """All experts of one action token, those not among the best K with weight 0. last: the prefix's last token."""
        decoder, router = self.policy.config.decoder, f"{name}.router_mot_gen"
        assert decoder.experts is not None
        scores = self.linear(router, last)
        if decoder.experts.routing == "token":
            scores = scores + self.linear(f"{router}.token", x)
        chances = torch.exp(scores) / torch.exp(scores).sum()
        least = chances.sort(descending=True).values[decoder.experts.top_k - 1]
        weights = torch.where(chances >= least, chances, 0.0)
        outputs = [self.feed_forward(f"{name}.experts_mot_gen.{k}", x, decoder.gen) for k in range(len(scores))]
        return sum((w / weights.sum() * y for w, y in zip(weights, outputs, strict=True)), torch.zeros_like(x))

    def gate(self, features: Tensor, clean: Tensor, directions: Tensor, strength: float, temperature: float) -> Tensor:
        lifted = self.linear("action_to_vlm_proj", features)
        lifted = torch.cat([torch.zeros_like(lifted[:1]), lifted])
        observed = self.linear("mpg.obs_proj", lifted)
        anchor = standardise(self.linear("mpg.action_proj", clean)).mean(0).expand_as(observed)
        cost = sliced_distance(standardise(observed), anchor, directions)
        lifted = lifted + strength * self.linear("mpg.enhancement_proj", observed * math.exp(-cost / temperature))
        return self.linear("vlm_to_action_proj", lifted[1:])


def turn(heads: Tensor, position: int, decoder: DecoderConfig) -> Tensor:
    """Rotate pair (i, i + half) of every head as a complex number."""
    half = decoder.head_dim // 2
    inverse = 1 / decoder.rope_theta ** (2 * torch.arange(half) / decoder.head_dim)
    phase = position * (inverse.bfloat16().float() if decoder.rope == "bf16" else inverse)
    turned = torch.complex(heads[:, :half], heads[:, half:]) * torch.exp(1j * phase.double())
    return torch.cat([turned.real, turned.imag], -1)


def attend_by_hand(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(tokens, heads, X) to (tokens, heads x X): one softmax per token and head over all tokens up to itself."""
    result = torch.zeros_like(queries)
    for head in range(queries.shape[1]):
        group = head * keys.shape[1] // queries.shape[1]
        for n in range(queries.shape[0]):
            weight = torch.exp(keys[: n + 1, group] @ queries[n, head] / math.sqrt(queries.shape[2]))
            result[n, head] = weight @ values[: n + 1, group] / weight.sum()
    return result.flatten(1)


def standardise(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)


def sliced_distance(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Mean over directions of the squared Wasserstein-2 distance of the sorted projections."""
    costs = []
    for direction in directions:
        unit = direction / direction.norm()
        costs.append(float((((a @ unit).sort().values - (b @ unit).sort().values) ** 2).mean()))
    return sum(costs) / len(costs)


def build_naive(policy: Policy, inputs: PolicyInputs) -> Naive:
    tensors = {publish_name(name): value.double() for name, value in policy.state_dict().items()}
    with torch.no_grad():
        images = policy.encode_views(normalise_views(torch.from_numpy(inputs.views))[None])[0].double()
    embedded = tensors["language_model.model.embed_tokens.weight"][torch.from_numpy(inputs.token_ids)]
    embedded[inputs.image_start : inputs.image_start + len(images)] = images
    und = torch.cat([embedded[: inputs.state_index], embedded[inputs.state_index + 1 :]])
    partial = Naive(policy, tensors, und, torch.empty(0), inputs.state_index)
    hidden = partial.linear("proprio_encoder_robot.layer1", torch.from_numpy(inputs.state).double()).clamp(min=0)
    return replace(partial, state=partial.linear("proprio_encoder_robot.layer2", hidden))


def sample_naively(
    naive: Naive, noise: Tensor, directions: Tensor | None, previous: Tensor, delay: int, overrides: Mapping[str, int]
) -> Tensor:
    config, chunk = naive.policy.config, noise.shape[1]
    steps = overrides.get("num_inference_timesteps", config.flow_steps)
    rows = torch.stack([previous[min(row, len(previous) - 1)] for row in range(chunk)])
    actions = torch.empty(0)
    for iteration, start in enumerate(noise):
        clean = naive.encode_actions(actions, [config.gate.anchor_bucket] * chunk) if iteration else None
        actions = start.clone()
        for step in range(steps):
            actions[:delay] = rows[:delay]
            buckets = [1000 if row < delay else int(step / steps * 1000) for row in range(chunk)]
            features = naive.encode_actions(actions, buckets)
            if clean is not None:
                assert directions is not None
                gate = config.gate
                features = naive.gate(features, clean, directions[iteration - 1, step], gate.strength, gate.temperature)
            elif config.gate.present and config.gate.first_pass == "projected":
                features = naive.linear("vlm_to_action_proj", naive.linear("action_to_vlm_proj", features))
            actions = actions + naive.velocity(features) / steps
            actions[:delay] = rows[:delay]
    return actions


def random_inputs(policy: Policy, views: int, seed: int) -> PolicyInputs:
    draw, vision = np.random.default_rng(seed), policy.config.vision
    least = 0 if policy.config.decoder.experts is None else 1  # tokens after the state
    images, before = views * vision.tokens_per_view, int(draw.integers(1, 6))
    state_index = before + images + int(draw.integers(0, 4))
    return PolicyInputs(
        views=draw.integers(0, 256, (views, vision.image_size, vision.image_size, 3), dtype=np.uint8),
        token_ids=draw.integers(0, VOCABULARY, state_index + 1 + int(draw.integers(least, 6))),
        image_start=before,
        state_index=state_index,
        state=draw.standard_normal(200).astype(np.float32),
    )


def compare(seed: int, overrides: Mapping[str, int]) -> float:
    """Largest difference of the actions of a random policy, cached and naive."""
    policy = random_policy(random_config(seed, VOCABULARY), seed)
    views, draw = 1 + seed % 3, np.random.default_rng(100 + seed)
    inputs = random_inputs(policy, views, seed)
    engine = build_engine(policy, views=views, directions=True, overrides=overrides)
    spec = engine.spec.sampler
    noise = draw.standard_normal((spec.iterations, engine.spec.chunk, 200)).astype(np.float32)
    shape = (spec.iterations - 1, spec.flow_steps, spec.gate_directions, engine.spec.understanding_width)
    directions = draw.standard_normal(shape).astype(np.float32) if spec.gate == "directions" else None
    previous = draw.standard_normal((int(draw.choice((1, 5, 40))), 200)).astype(np.float32)
    delay = int(draw.integers(0, 5))
    result = engine.flow(engine.prefix(inputs), noise, directions=directions, prev_chunk=previous, delay=delay)
    given = None if directions is None else torch.from_numpy(directions).double()
    held = delay if policy.config.delay.trained else 0
    naive = build_naive(policy, inputs)
    actions = sample_naively(
        naive, torch.from_numpy(noise).double(), given, torch.from_numpy(previous).double(), held, overrides
    )
    return float(np.abs(result.actions - actions.numpy()).max())


@pytest.mark.parametrize("seed", range(8))
def test_cached_network_equals_the_naive_one(seed: int) -> None:
    assert compare(seed, {"num_inference_timesteps": 2}) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 24))
def test_cached_network_equals_the_naive_one_at_full_length(seed: int) -> None:
    assert compare(seed, {}) <= TOLERANCE


# Mistakes in a mixture of experts, made in the real code: each moves the actions of some network.


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[[Function], Function]) -> None:
    patch.setattr(owner, name, change(getattr(owner, name)))


def rechoose(patch: pytest.MonkeyPatch, change: Callable[[Route], Route]) -> None:
    wrap(patch, decoder_module, "choose", lambda choose: lambda *arguments: change(choose(*arguments)))


def weights_not_renormalised(patch: pytest.MonkeyPatch) -> None:
    rechoose(patch, lambda route: route._replace(weights=route.logits.softmax(-1).gather(-1, route.chosen)))


def weights_all_equal(patch: pytest.MonkeyPatch) -> None:
    rechoose(patch, lambda route: route._replace(weights=torch.full_like(route.weights, 1 / route.weights.shape[-1])))


def experts_swapped(patch: pytest.MonkeyPatch) -> None:
    rechoose(patch, lambda route: route._replace(chosen=route.chosen.flip(-1)))


def router_reads_the_token_before(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Layer, "_read_prefixes", lambda read: lambda self, und, places: read(self, und.roll(1, 1), places))


def router_reads_before_the_norm(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Router, "forward", lambda read: lambda self, x: read(self, 2 * x))


def state_through_experts(patch: pytest.MonkeyPatch) -> None:
    def finish(self: RoutedStream, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended)
        return x + self.experts[0](self.post_attention_layernorm(x))

    patch.setattr(RoutedStream, "finish", finish)


def adapters_forgotten(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, SlotAdapter, "rows", lambda rows: lambda self: 0 * rows(self))


MISTAKES = [
    weights_not_renormalised,
    weights_all_equal,
    experts_swapped,
    router_reads_the_token_before,
    router_reads_before_the_norm,
    state_through_experts,
    adapters_forgotten,
]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_the_mixture(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    worst = max(compare(seed, {"num_inference_timesteps": 1}) for seed in (3, 18))
    assert worst > 10 * TOLERANCE
