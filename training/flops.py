"""Floating-point operations of the network's matrix products, by formula: two for each weight that a token meets.

Norms, activations and softmax are left out, as is usual; attention counts whole squares, masked or not.
"""

from dataclasses import dataclass

from onbeat.training.config import DecoderConfig, PolicyConfig, StreamConfig, VisionConfig
from onbeat.training.model.heads import UNIFIED

COLOURS = 3


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one observation's forward pass. flow: all draws together."""

    views: int
    prefix: int
    flow: int

    @property
    def total(self) -> int:
        """Forward. A training step takes three times as much where everything is trained: twice on the way back."""
        return self.views + self.prefix + self.flow


def count_flops(config: PolicyConfig, *, views: int, tokens: int, draws: int) -> Flops:
    """Without a gate. tokens: N of the whole prefix, image tokens and state included."""
    actions = draws * config.chunk
    return Flops(
        views=views * (view_flops(config.vision) + _connector(config)),
        prefix=prefix_flops(config.decoder, tokens) + _state_head(config),
        flow=flow_flops(config.decoder, tokens, actions) + _action_heads(config, actions),
    )


def view_flops(vision: VisionConfig) -> int:
    """One image through the tower."""
    tokens, width = vision.grid**2 + 1, vision.width
    layer = 2 * tokens * (4 * width * width + 2 * width * vision.ffn_width) + 4 * tokens * tokens * width
    return 2 * vision.grid**2 * COLOURS * vision.patch_size**2 * width + vision.depth * layer


def prefix_flops(decoder: DecoderConfig, tokens: int) -> int:
    """All layers but the last whole, of which only keys and values are needed. One token is the state's."""
    attention = 4 * tokens * tokens * decoder.heads * decoder.head_dim
    whole = (tokens - 1) * _token(decoder, decoder.und) + _token(decoder, decoder.gen) + attention
    last = (tokens - 1) * _keys_values(decoder, decoder.und) + _keys_values(decoder, decoder.gen)
    return (decoder.layers - 1) * whole + last


def flow_flops(decoder: DecoderConfig, tokens: int, actions: int) -> int:
    """Action tokens through all layers; with experts each takes top_k of them."""
    attention = 4 * actions * (tokens + actions) * decoder.heads * decoder.head_dim
    layer = actions * _token(decoder, decoder.gen) + attention
    return decoder.layers * layer + _experts_more(decoder, actions)


def _token(decoder: DecoderConfig, stream: StreamConfig) -> int:
    heads = decoder.heads * decoder.head_dim
    return _keys_values(decoder, stream) + 4 * stream.width * heads + 6 * stream.width * stream.ffn_width


def _keys_values(decoder: DecoderConfig, stream: StreamConfig) -> int:
    return 4 * stream.width * decoder.kv_heads * decoder.head_dim


def _experts_more(decoder: DecoderConfig, actions: int) -> int:
    experts = decoder.experts
    if experts is None:
        return 0
    layers = decoder.layers - experts.foundation_layers
    router = 2 * decoder.und.width * experts.count
    by_token = 2 * actions * decoder.gen.width * experts.count if experts.routing == "token" else 0
    more = (experts.top_k - 1) * 6 * actions * decoder.gen.width * decoder.gen.ffn_width
    return layers * (router + by_token + more)


def _connector(config: PolicyConfig) -> int:
    wide, width = config.vision.width * config.vision.shuffle**2, config.decoder.und.width
    return 2 * config.vision.tokens_per_view * (wide * width + width * width)


def _state_head(config: PolicyConfig) -> int:
    width = config.decoder.gen.width
    return 2 * (UNIFIED * width + width * width)


def _action_heads(config: PolicyConfig, actions: int) -> int:
    width = config.decoder.gen.width
    return 2 * actions * (UNIFIED * width + 3 * width * width + width * width + UNIFIED * width)
