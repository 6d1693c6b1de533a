"""The whole network: views, text and state to a cache; noisy actions and the cache to a velocity."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onbeat.training.config import PolicyConfig
from onbeat.training.model.adapters import SlotAdapter, SlotInput, SlotOutput
from onbeat.training.model.connector import Connector
from onbeat.training.model.decoder import Decoder, KeysValues, RmsNorm, RoutedStream
from onbeat.training.model.experts import Routing, summarise
from onbeat.training.model.gating import ManifoldGate
from onbeat.training.model.heads import UNIFIED, ActionEncoder, TwoLayers
from onbeat.training.model.packing import stack, unstack
from onbeat.training.model.vision import Layer as VisionLayer
from onbeat.training.model.vision import VisionTower

# B batch, V views, S image side, N prefix tokens, D draws (noise and time) per prefix, C chunk rows, A = 200 slots,
# E width of the action stream.

Cache = list[KeysValues]
Refine = Callable[[Tensor], Tensor]


class Prefix(NamedTuple):
    """What precedes the actions of one group of observations. See `Policy.encode_prefix`."""

    pixel_values: Tensor
    token_ids: Tensor
    image_start: int
    state_index: int
    state: Tensor


class Flow(NamedTuple):
    """velocity (B, D, C, A), and what the routers did, None where no layer has experts."""

    velocity: Tensor
    routing: Routing | None


INITIAL_DEVIATION = 0.02
INITIAL_LAYER_SCALE = 0.1


class Policy(nn.Module):
    """Being-H0.5. mpg is None where the checkpoint has no gate."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder.gen.width
        self.vit_model = VisionTower(config.vision)
        self.connector = Connector(config)
        self.language_model = Decoder(config.decoder)
        self.state_encoder = TwoLayers(UNIFIED, width, width)
        self.action_encoder = ActionEncoder(width)
        self.action_decoder = TwoLayers(width, width, UNIFIED)
        self.mpg = ManifoldGate(config.decoder) if config.gate.present else None
        if config.adapters:
            self.state_encoder.layer1 = SlotInput(UNIFIED, width)
            self.action_encoder.W1 = SlotInput(UNIFIED, width)
            self.action_decoder.layer2 = SlotOutput(width, UNIFIED)

    def encode_views(self, pixel_values: Tensor) -> Tensor:
        """Normalised views (B, V, 3, S, S) to image tokens (B, V x tokens_per_view, und width)."""
        return self.encode_images([pixel_values])[0]

    def encode_images(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """`encode_views` of several groups, whose numbers of views may differ, in one pass."""
        tokens = self.connector(self.vit_model(stack([group.flatten(0, 1) for group in groups])))
        parts = unstack(tokens, [group.shape[0] * group.shape[1] for group in groups])
        return [part.unflatten(0, group.shape[:2]).flatten(1, 2) for part, group in zip(parts, groups, strict=True)]

    def embed_prefix(self, image_tokens: Tensor, token_ids: Tensor, image_start: int, state_index: int) -> Tensor:
        """Und tokens in order, without the state token: (B, N - 1, und width).

        token_ids: (B, N), anything where the image tokens and the state token stand. The images precede the state.
        """
        after = image_start + image_tokens.shape[1]
        assert after <= state_index, f"image tokens end at {after}, after the state token at {state_index}"
        words = [token_ids[:, :image_start], token_ids[:, after:state_index], token_ids[:, state_index + 1 :]]
        text = self.language_model.embed_tokens(torch.cat(words, dim=1))  # once: its gradient is as large as its table
        return torch.cat([text[:, :image_start], image_tokens, text[:, image_start:]], dim=1)

    def encode_prefix(
        self, pixel_values: Tensor, token_ids: Tensor, image_start: int, state_index: int, state: Tensor
    ) -> Cache:
        """All that precedes the actions, once: per layer keys and values (B, kv_heads, N, head_dim).

        pixel_values (B, V, 3, S, S) normalised, token_ids (B, N), state (B, A) normalised and unified.
        """
        return self.encode_prefixes([Prefix(pixel_values, token_ids, image_start, state_index, state)])[0]

    def encode_prefixes(self, prefixes: Sequence[Prefix]) -> list[Cache]:
        """`encode_prefix` of several groups, whose views and lengths may differ, in one pass: a cache for each."""
        images = self.encode_images([prefix.pixel_values for prefix in prefixes])
        und = [self.embed_prefix(views, *prefix[1:4]) for views, prefix in zip(images, prefixes, strict=True)]
        states = self.state_encoder(stack([prefix.state for prefix in prefixes])).unsqueeze(1)
        sizes, indices = [len(prefix.state) for prefix in prefixes], [prefix.state_index for prefix in prefixes]
        return self.language_model.encode_prefixes(und, unstack(states, sizes), indices)

    def velocity(self, cache: Cache, actions: Tensor, bucket: Tensor, refine: Refine | None = None) -> Tensor:
        """Velocity (B, D, C, A) of noisy actions (B, D, C, A) at time buckets (B, D, C).

        refine: what the gate does to the action features (B, D, C, E) before the decoder sees them.
        """
        return self.flow(cache, actions, bucket, refine).velocity

    def flow(self, cache: Cache, actions: Tensor, bucket: Tensor, refine: Refine | None = None) -> Flow:
        """As `velocity`, with what the routers did."""
        return self.flows([cache], actions, bucket, refine)

    def flows(
        self, caches: Sequence[Cache], actions: Tensor, bucket: Tensor, refine: Refine | None = None
    ) -> Flow:
        """`flow` of several groups in one pass: of all but the caches, the groups' parts one after the other."""
        features = self.action_encoder(actions, bucket)
        return self._decode(caches, features if refine is None else refine(features))

    def decode_velocity(self, cache: Cache, features: Tensor) -> Tensor:
        """Action features (B, D, C, E) to velocities (B, D, C, A)."""
        return self._decode([cache], features).velocity

    def _decode(self, caches: Sequence[Cache], features: Tensor) -> Flow:
        tokens, routes = self.language_model.advance(features, caches)
        return Flow(self.action_decoder(tokens), summarise(routes, len(features)) if routes else None)


def create_policy(config: PolicyConfig, seed: int) -> Policy:
    """A policy with random weights, ready to be trained: nothing starts at zero that would block a gradient."""
    policy = Policy(config)
    initialise(policy, torch.Generator().manual_seed(seed))
    return policy


def initialise(policy: Policy, generator: torch.Generator) -> None:
    """Truncated normal weights, zero biases, norms at 1, LayerScale small; position embeddings random too."""
    for module in policy.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            _fill(module.weight, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            _fill(module.weight, generator)
        elif isinstance(module, nn.LayerNorm | RmsNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, VisionLayer):
            nn.init.constant_(module.ls1, INITIAL_LAYER_SCALE)
            nn.init.constant_(module.ls2, INITIAL_LAYER_SCALE)
    _fill(policy.vit_model.embeddings.class_embedding, generator)
    _fill(policy.vit_model.embeddings.position_embedding, generator)


def _fill(weight: Tensor, generator: torch.Generator) -> None:
    bound = 2 * INITIAL_DEVIATION
    nn.init.trunc_normal_(weight, std=INITIAL_DEVIATION, a=-bound, b=bound, generator=generator)


def count_parameters(policy: Policy) -> dict[str, int]:
    """Parameters by part, and in "total". lm_head counts though no action ever needs it.

    "gen" is without "experts" and "routers", "heads" without "adapters". "at work": what a control step reads, so
    neither the embedding, of which it takes a few rows, nor lm_head, nor adapters, which are folded, and of the experts
    those that are chosen.
    """
    decoder, experts = policy.language_model, policy.config.decoder.experts
    routed = [layer.gen for layer in decoder.stack if isinstance(layer.gen, RoutedStream)]
    counts = {
        "vision": _count(policy.vit_model),
        "connector": _count(policy.connector),
        "embedding": _count(decoder.embed_tokens),
        "und": _count(*(layer.und for layer in decoder.stack), decoder.norm["und"]),
        "gen": _count(*(layer.gen for layer in decoder.stack), decoder.norm["gen"]),
        "experts": _count(*(stream.experts for stream in routed)),
        "routers": _count(*(stream.router for stream in routed)),
        "lm_head": _count(decoder.lm_head),
        "heads": _count(policy.state_encoder, policy.action_encoder, policy.action_decoder),
        "adapters": _count(*(module for module in policy.modules() if isinstance(module, SlotAdapter))),
        "gate": _count(policy.mpg),
    }
    counts["gen"] -= counts["experts"] + counts["routers"]
    counts["heads"] -= counts["adapters"]
    chosen = 0 if experts is None else counts["experts"] * experts.top_k // experts.count
    idle = counts["embedding"] + counts["lm_head"] + counts["adapters"] + counts["experts"] - chosen
    total = sum(counts.values())
    return {**counts, "total": total, "at work": total - idle}


def _count(*modules: nn.Module | None) -> int:
    return sum(parameter.numel() for module in modules if module for parameter in module.parameters())
