"""Mixture of Transformers: two streams with weights of their own in every layer, one attention over all tokens.

The understanding stream (und) carries text and image tokens, the action stream (gen) the state token and the actions.
The sequence is causal and the actions come last, so the prefix is computed once and only its keys and values are kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onbeat.training.config import DecoderConfig, ExpertsConfig, StreamConfig
from onbeat.training.model.experts import Experts, Route, Router, choose
from onbeat.training.model.feed_forward import GatedFeedForward
from onbeat.training.model.packing import Shape, join, split, stack, unstack

# B batch, N prefix tokens (the state token included), D draws per prefix, C chunk rows,
# H query heads, G key-value heads, X head width, W stream width.


class KeysValues(NamedTuple):
    """One layer's cache: keys after norm and rotation, values; both (B, G, N, X).

    router: (B, E), what the prefix says to the layer's choice among experts, None where it has none.
    """

    keys: Tensor
    values: Tensor
    router: Tensor | None = None


class Advanced(NamedTuple):
    """Action tokens (B, T, W) after a layer, and the experts they took, None where it has none."""

    tokens: Tensor
    route: Route | None


class Rotation(NamedTuple):
    """cos and sin of the rotary phases, (tokens, X)."""

    cos: Tensor
    sin: Tensor


class Rotary(nn.Module):
    """Rotary phases. "bf16" rounds the inverse frequencies as the published code does: 0.32 rad at position 280."""

    inverse_frequency: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        inverse = 1.0 / config.rope_theta**exponent
        if config.rope == "bf16":
            inverse = inverse.bfloat16().float()
        self.register_buffer("inverse_frequency", inverse, persistent=False)

    def forward(self, positions: Tensor) -> Rotation:
        """positions: (tokens,) integers."""
        phase = positions.float().unsqueeze(-1) * self.inverse_frequency
        phase = torch.cat([phase, phase], dim=-1)
        return Rotation(phase.cos(), phase.sin())


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate (B, heads, tokens, X) by half-split pairs (i, i + X / 2)."""
    low, high = x.chunk(2, dim=-1)
    return x * by.cos + torch.cat([-high, low], dim=-1) * by.sin


class RmsNorm(nn.Module):
    """x / rms(x), scaled per channel."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class SelfAttention(nn.Module):
    """One stream's projections into and out of the shared attention."""

    def __init__(self, config: DecoderConfig, stream: StreamConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(stream.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(stream.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(stream.width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, stream.width, bias=False)
        self.q_norm = RmsNorm(config.head_dim, stream.norm_epsilon)
        self.k_norm = RmsNorm(config.head_dim, stream.norm_epsilon)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, tokens, heads x X) to (B, tokens, heads, X)."""
        return x.unflatten(-1, (-1, self.head_dim))


class Stream(nn.Module):
    """One stream's weights of one layer. Every norm, q and k included, uses the stream's own epsilon."""

    def __init__(self, config: DecoderConfig, stream: StreamConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, stream)
        self.mlp = GatedFeedForward(stream)
        self.input_layernorm = RmsNorm(stream.width, stream.norm_epsilon)
        self.post_attention_layernorm = RmsNorm(stream.width, stream.norm_epsilon)

    def queries(self, normed: Tensor) -> Tensor:
        """(B, tokens, W) after the input norm to queries before rotation, (B, tokens, H, X)."""
        return self.self_attn.q_norm(self.self_attn.split_heads(self.self_attn.q_proj(normed)))

    def keys(self, normed: Tensor) -> Tensor:
        """(B, tokens, W) after the input norm to keys before rotation, (B, tokens, G, X)."""
        return self.self_attn.k_norm(self.self_attn.split_heads(self.self_attn.k_proj(normed)))

    def values(self, normed: Tensor) -> Tensor:
        """(B, tokens, W) after the input norm to values, (B, tokens, G, X)."""
        return self.self_attn.split_heads(self.self_attn.v_proj(normed))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add attention's result (B, tokens, H x X) to the residual (B, tokens, W), then the feed-forward."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class RoutedStream(Stream):
    """An action stream whose actions take experts; the state token keeps the shared feed-forward."""

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig) -> None:
        super().__init__(config, config.gen)
        self.top_k = experts.top_k
        self.router = Router(config, experts)
        self.experts = Experts(config, experts)

    def finish_actions(self, x: Tensor, attended: Tensor, scores: Tensor) -> Advanced:
        """As `finish`, by experts. scores: (B, E), the router's reading of the prefix."""
        x = x + self.self_attn.o_proj(attended)
        normed = self.post_attention_layernorm(x)
        if self.router.token is None:
            route = choose(scores, self.top_k)
            return Advanced(x + self.experts(normed, route), route)
        route = choose((scores[:, None] + self.router.token(normed)).flatten(0, 1), self.top_k)
        return Advanced(x + self.experts(normed.flatten(0, 1)[:, None], route).view_as(x), route)


def insert_token(others: Tensor, token: Tensor, index: int) -> Tensor:
    """(B, N - 1, ...) and (B, 1, ...) to (B, N, ...) with the token at `index`."""
    return torch.cat([others[:, :index], token, others[:, index:]], dim=1)


def remove_token(tokens: Tensor, index: int) -> Tensor:
    """(B, N, ...) to (B, N - 1, ...) without the one at `index`."""
    return torch.cat([tokens[:, :index], tokens[:, index + 1 :]], dim=1)


def attend(queries: Tensor, cache: KeysValues, mask: Tensor | None) -> Tensor:
    """Softmax attention of (B, H, T, X) to (B, G, K, X), heads joined: (B, T, H x X). No mask: causal, T = K."""
    result = F.scaled_dot_product_attention(
        queries,
        cache.keys,
        cache.values,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=queries.shape[1] != cache.keys.shape[1],
    )
    return result.transpose(1, 2).flatten(2)


class Place(NamedTuple):
    """One group of prefixes. shape: (B, N - 1) of its und tokens; state: where the state token stands among them."""

    shape: Shape
    state: int
    by: Rotation


class Seen(NamedTuple):
    """What the actions of a group may look at: its cache, and a mask (T, N + T) over it and themselves."""

    cache: KeysValues
    by: Rotation
    mask: Tensor


class Layer(nn.Module):
    """One layer: both streams' weights. routed: whether its actions take experts.

    Groups of prefixes of different lengths pass together: see packing.py. One group is the usual case.
    """

    def __init__(self, config: DecoderConfig, *, routed: bool = False) -> None:
        super().__init__()
        self.und = Stream(config, config.und)
        experts = config.experts if routed else None
        self.gen = Stream(config, config.gen) if experts is None else RoutedStream(config, experts)

    def forward(
        self, und: Tensor, state: Tensor, places: Sequence[Place]
    ) -> tuple[Tensor, Tensor, list[KeysValues]]:
        """The prefixes: und tokens joined from (B, N - 1, W), state tokens (sum of B, 1, W); a cache per group."""
        normed = self.und.input_layernorm(und), self.gen.input_layernorm(state)
        caches = self._keys_values(*normed, places)
        queries = self._interleave(self.und.queries(normed[0]), self.gen.queries(normed[1]), places)
        attended = [
            attend(rotate(own.transpose(1, 2), place.by), cache, None)
            for own, cache, place in zip(queries, caches, places, strict=True)
        ]
        others = join([remove_token(group, place.state) for group, place in zip(attended, places, strict=True)])
        states = stack([group[:, p.state : p.state + 1] for group, p in zip(attended, places, strict=True)])
        return self.und.finish(und, others), self.gen.finish(state, states), caches

    def prefix_cache(self, und: Tensor, state: Tensor, places: Sequence[Place]) -> list[KeysValues]:
        """What alone is needed of the last layer: keys and values of the prefixes."""
        return self._keys_values(self.und.input_layernorm(und), self.gen.input_layernorm(state), places)

    def advance(self, x: Tensor, seen: Sequence[Seen]) -> Advanced:
        """The actions: gen tokens (sum of B, T, W) that see their group's cache and, as its mask allows, each other."""
        normed = self.gen.input_layernorm(x)
        sizes = [len(group.cache.keys) for group in seen]
        own = (unstack(t, sizes) for t in (self.gen.queries(normed), self.gen.keys(normed), self.gen.values(normed)))
        attended = stack([look(*tokens) for tokens in zip(*own, seen, strict=True)])
        if isinstance(self.gen, RoutedStream):
            scores = [group.cache.router for group in seen if group.cache.router is not None]
            assert len(scores) == len(seen), "the prefix was made without this layer's router"
            return self.gen.finish_actions(x, attended, stack(scores))
        return Advanced(self.gen.finish(x, attended), None)

    def _keys_values(self, und: Tensor, state: Tensor, places: Sequence[Place]) -> list[KeysValues]:
        keys = self._interleave(self.und.keys(und), self.gen.keys(state), places)
        values = self._interleave(self.und.values(und), self.gen.values(state), places)
        scores = self._read_prefixes(und, places)
        return [
            KeysValues(rotate(k.transpose(1, 2), place.by), v.transpose(1, 2), score)
            for k, v, score, place in zip(keys, values, scores, places, strict=True)
        ]

    @staticmethod
    def _interleave(und: Tensor, state: Tensor, places: Sequence[Place]) -> list[Tensor]:
        """Und tokens and state tokens to whole prefixes (B, N, ...), group by group."""
        groups = zip(_split_und(und, places), _split_state(state, places), places, strict=True)
        return [insert_token(others, token, place.state) for others, token, place in groups]

    def _read_prefixes(self, und: Tensor, places: Sequence[Place]) -> Sequence[Tensor | None]:
        """The router's scores of each group's prefixes (B, E), from the last token as it enters the layer, normed."""
        if not isinstance(self.gen, RoutedStream):
            return [None] * len(places)
        for place in places:
            assert place.state < place.shape[1], f"the state token, at {place.state}, ends what the router reads"
        return _split_state(self.gen.router(stack([group[:, -1] for group in _split_und(und, places)])), places)


def _split_und(tokens: Tensor, places: Sequence[Place]) -> list[Tensor]:
    return split(tokens, [place.shape for place in places])


def _split_state(rows: Tensor, places: Sequence[Place]) -> list[Tensor]:
    return unstack(rows, [place.shape[0] for place in places])


def look(queries: Tensor, keys: Tensor, values: Tensor, seen: Seen) -> Tensor:
    """Attention of one group's actions, (B, T, heads, X) each, to what they may see: (B, T, H x X)."""
    keys = torch.cat([seen.cache.keys, rotate(keys.transpose(1, 2), seen.by)], dim=2)
    values = torch.cat([seen.cache.values, values.transpose(1, 2)], dim=2)
    return attend(rotate(queries.transpose(1, 2), seen.by), KeysValues(keys, values), seen.mask)


class Decoder(nn.Module):
    """Embeddings, layers and final norms. The und norm and lm_head never reach the actions; they are kept to be written
    back. lm_head is None where it is tied to the embeddings."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.und.width)
        self.layers = nn.ModuleList(Layer(config, routed=config.is_routed(n)) for n in range(config.layers))
        self.norm = nn.ModuleDict(
            {
                "und": RmsNorm(config.und.width, config.und.norm_epsilon),
                "gen": RmsNorm(config.gen.width, config.gen.norm_epsilon),
            }
        )
        self.lm_head = None if config.tied else nn.Linear(config.und.width, config.vocabulary, bias=False)
        self.rotary = Rotary(config)

    @property
    def stack(self) -> list[Layer]:
        """The layers, with their type."""
        return list(self.layers)  # pyright: ignore[reportReturnType]

    def encode_prefixes(
        self, und: Sequence[Tensor], state: Sequence[Tensor], indices: Sequence[int]
    ) -> list[list[KeysValues]]:
        """Per group: und (B, N - 1, W) and the state token (B, 1, W), which stands at `index` of N, to a cache per
        layer."""
        places = [self.place(group, index) for group, index in zip(und, indices, strict=True)]
        tokens, states = join(und), stack(state)
        caches: list[list[KeysValues]] = []
        *layers, last = self.stack
        for layer in layers:
            tokens, states, cache = layer(tokens, states, places)
            caches.append(cache)
        caches.append(last.prefix_cache(tokens, states, places))
        return [list(group) for group in zip(*caches, strict=True)]

    def encode_prefix(self, und: Tensor, state: Tensor, index: int) -> list[KeysValues]:
        """`encode_prefixes` of one group."""
        return self.encode_prefixes([und], [state], [index])[0]

    def advance(self, features: Tensor, caches: Sequence[list[KeysValues]]) -> tuple[Tensor, list[Route]]:
        """Action features (sum of B, D, C, W) of D independent draws, each group with its cache, to the normed output
        of the action stream, same shape, and the routes of the layers that have experts."""
        draws, chunk = features.shape[1:3]
        views = [self._view(cache[0], draws, chunk) for cache in caches]
        x, routes = features.flatten(1, 2), list[Route]()
        for layer, *groups in zip(self.stack, *caches, strict=True):
            seen = [Seen(cache, *view) for cache, view in zip(groups, views, strict=True)]
            x, route = layer.advance(x, seen)
            routes += [] if route is None else [route]
        return self.norm["gen"](x).unflatten(1, (draws, chunk)), routes

    def place(self, und: Tensor, index: int) -> Place:
        """The place of a group whose und tokens are (B, N - 1, W)."""
        batch, others = und.shape[:2]
        return Place((batch, others), index, self.rotary(torch.arange(others + 1, device=und.device)))

    def _view(self, cache: KeysValues, draws: int, chunk: int) -> tuple[Rotation, Tensor]:
        length, device = cache.keys.shape[2], cache.keys.device
        by = self.rotary((length + torch.arange(chunk, device=device)).repeat(draws))
        return by, draw_mask(length, draws, chunk, device)


def draw_mask(length: int, draws: int, chunk: int, device: torch.device) -> Tensor:
    """True where action token (draw d, row r) may look: all `length` prefix tokens, and rows <= r of its own draw.

    (draws x chunk, length + draws x chunk)
    """
    own = torch.block_diag(*[torch.ones(chunk, chunk, device=device).tril()] * draws).bool()
    prefix = torch.ones(draws * chunk, length, dtype=torch.bool, device=device)
    return torch.cat([prefix, own], dim=1)
