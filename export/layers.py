"""The network's layers as ONNX nodes: each function adds nodes to a graph and returns the value they make.

T rows of a stream, W its width, h query heads, k key-value heads, g = h / k queries per key-value head, d head width.
Weights keep the names of the published checkpoint, with a suffix when they are stored in another form.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onbeat.export.graph import Graph
from onbeat.training.config import DecoderConfig, StreamConfig

MASKED = -1e4  # exp(-1e4) is 0 in fp32 and fp16 alike, and unlike -inf it survives fp16 arithmetic
ROPE = "rope.inverse_frequency"  # not in checkpoints: the network computes it

Parameters = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Stream:
    """One of the two streams of a mixture-of-transformers layer, and how the names of its parameters end."""

    suffix: str
    config: StreamConfig


def understanding_stream(decoder: DecoderConfig) -> Stream:
    """Text and images."""
    return Stream("", decoder.und)


def action_stream(decoder: DecoderConfig) -> Stream:
    """The state and the actions."""
    return Stream("_mot_gen", decoder.gen)


def linear(graph: Graph, name: str, x: str) -> str:
    """x (T, in) -> (T, out): `name.weight` (out, in), and `name.bias` when there is one."""
    matrix = graph.parameters[f"{name}.weight"]
    stored = graph.weight(f"{name}.weight^T", matrix.T)
    y = graph.op("MatMul", x, stored)
    bias = graph.parameters.get(f"{name}.bias")
    return y if bias is None else graph.op("Add", y, graph.weight(f"{name}.bias", bias))


def merged_linear(graph: Graph, name: str, parts: Sequence[str], x: str) -> str:
    """Several projections of one input (none has a bias) as a single product, their outputs side by side."""
    stored = graph.weight(
        f"{name}.weight^T", lambda: np.concatenate([graph.parameters[f"{part}.weight"] for part in parts]).T
    )
    return graph.op("MatMul", x, stored)


def rms_norm(graph: Graph, x: str, weight: str, epsilon: float) -> str:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis."""
    square = graph.op("Pow", x, graph.floats(2.0))
    mean = graph.op("ReduceMean", square, graph.ints([-1]), keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", mean, graph.floats(epsilon)))
    return graph.op("Mul", graph.op("Div", x, root), weight)


def layer_norm(graph: Graph, name: str, x: str, epsilon: float) -> str:
    """LayerNorm with the affine weights under `name`."""
    scale, bias = (graph.parameter(f"{name}.{part}") for part in ("weight", "bias"))
    return graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


def plain_layer_norm(graph: Graph, x: str, width: int, epsilon: float) -> str:
    """LayerNorm without affine weights."""
    ones = graph.weight(f"ones_{width}", np.ones(width, np.float32))
    return graph.op("LayerNormalization", x, ones, axis=-1, epsilon=epsilon)


def silu(graph: Graph, x: str) -> str:
    """x * sigmoid(x)."""
    return graph.op("Mul", x, graph.op("Sigmoid", x))


def relu(graph: Graph, x: str) -> str:
    """max(x, 0)."""
    return graph.op("Relu", x)


def gelu(graph: Graph, x: str) -> str:
    """The erf form."""
    return graph.op("Gelu", x)


def gelu_tanh(graph: Graph, x: str) -> str:
    """The tanh form."""
    return graph.op("Gelu", x, approximate="tanh")


ACTIVATIONS = {
    "silu": silu,
    "swish": silu,
    "relu": relu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}


def relu_mlp(graph: Graph, name: str, x: str) -> str:
    """The two-layer state and action heads."""
    hidden = graph.op("Relu", linear(graph, f"{name}.layer1", x))
    return linear(graph, f"{name}.layer2", hidden)


def rope_tables(graph: Graph, positions: str) -> tuple[str, str]:
    """positions (T,) int64 -> cosine and sine, each (T, 1, d): half-split rotary embedding."""
    frequencies = graph.weight(f"{ROPE}/twice", np.tile(graph.parameters[ROPE], 2)[None])
    column = graph.op("Unsqueeze", graph.op("Cast", positions, to=1), graph.ints([1]))
    angles = graph.op("Unsqueeze", graph.op("Mul", column, frequencies), graph.ints([1]))
    return graph.op("Cos", angles), graph.op("Sin", angles)


def rotate(graph: Graph, x: str, tables: tuple[str, str], width: int) -> str:
    """Rotary embedding of x (T, heads, d)."""
    first, second = graph.ops("Split", x, graph.ints([width // 2, width // 2]), outputs=2, axis=-1)
    turned = graph.op("Concat", graph.op("Neg", second), first, axis=-1)
    return graph.op("Add", graph.op("Mul", x, tables[0]), graph.op("Mul", turned, tables[1]))


def project_heads(graph: Graph, layer: str, stream: Stream, decoder: DecoderConfig, x: str) -> list[str]:
    """Normed x (T, W) -> query (T, h, d), key (T, k, d), value (T, k, d) before rotation, q and k normalised per head.

    The softmax's 1 / sqrt(d) is folded into the query's norm.
    """
    attention = f"{layer}.self_attn"
    names = [f"{attention}.{part}_proj{stream.suffix}" for part in "qkv"]
    flat = merged_linear(graph, f"{attention}.qkv_proj{stream.suffix}", names, x)
    rows = graph.op("Reshape", flat, graph.ints([-1, decoder.heads + 2 * decoder.kv_heads, decoder.head_dim]))
    sizes = graph.ints([decoder.heads, decoder.kv_heads, decoder.kv_heads])
    query, key, value = graph.ops("Split", rows, sizes, outputs=3, axis=1)
    scale = graph.parameters[f"{attention}.q_norm{stream.suffix}.weight"] * np.float32(decoder.head_dim**-0.5)
    query_norm = graph.weight(f"{attention}.q_norm{stream.suffix}.weight*scale", scale)
    query = rms_norm(graph, query, query_norm, stream.config.norm_epsilon)
    return [query, _normed_key(graph, attention, stream, key), value]


def project_key_value(graph: Graph, layer: str, stream: Stream, decoder: DecoderConfig, x: str) -> list[str]:
    """Key and value alone, for the prefix's last layer, whose queries nobody reads."""
    attention = f"{layer}.self_attn"
    names = [f"{attention}.{part}_proj{stream.suffix}" for part in "kv"]
    flat = merged_linear(graph, f"{attention}.kv_proj{stream.suffix}", names, x)
    rows = graph.op("Reshape", flat, graph.ints([-1, 2 * decoder.kv_heads, decoder.head_dim]))
    key, value = graph.ops("Split", rows, graph.ints([decoder.kv_heads] * 2), outputs=2, axis=1)
    return [_normed_key(graph, attention, stream, key), value]


def _normed_key(graph: Graph, attention: str, stream: Stream, key: str) -> str:
    name = f"{attention}.k_norm{stream.suffix}.weight"
    return rms_norm(graph, key, graph.parameter(name), stream.config.norm_epsilon)


def heads_first(graph: Graph, x: str) -> str:
    """(T, heads, d) -> (heads, T, d)."""
    return graph.op("Transpose", x, perm=[1, 0, 2])


def attend(graph: Graph, decoder: DecoderConfig, query: str, key: str, value: str, mask: str) -> str:
    """query (T, h, d); key, value (k, L, d); mask (g T, L), added -> (T, h d).

    The g query heads of a key-value head are stacked along T, so nothing is repeated.
    """
    stacked = graph.op("Reshape", heads_first(graph, query), graph.ints([decoder.kv_heads, -1, decoder.head_dim]))
    scores = graph.op("MatMul", stacked, graph.op("Transpose", key, perm=[0, 2, 1]))
    chances = graph.op("Softmax", graph.op("Add", scores, mask), axis=-1)
    mixed = graph.op("Reshape", graph.op("MatMul", chances, value), graph.ints([decoder.heads, -1, decoder.head_dim]))
    return graph.op("Reshape", heads_first(graph, mixed), graph.ints([-1, decoder.heads * decoder.head_dim]))


def causal_mask(graph: Graph, decoder: DecoderConfig, query_positions: str, key_positions: str) -> str:
    """0 where a query may see a key, MASKED elsewhere: (g T, L) for positions (T,) and (L,)."""
    rows = graph.op("Unsqueeze", query_positions, graph.ints([1]))
    columns = graph.op("Unsqueeze", key_positions, graph.ints([0]))
    seen = graph.op("GreaterOrEqual", rows, columns)
    mask = graph.op("Where", seen, graph.floats(0.0), graph.floats(MASKED))
    group = decoder.heads // decoder.kv_heads
    return mask if group == 1 else graph.op("Concat", *[mask] * group, axis=0)


def input_norm(graph: Graph, layer: str, stream: Stream, x: str) -> str:
    """The norm before attention."""
    return _stream_norm(graph, f"{layer}.input_layernorm{stream.suffix}", stream, x)


def finish_layer(
    graph: Graph, layer: str, stream: Stream, x: str, attended: str, feed_forward: Callable[[str], str] | None = None
) -> str:
    """Residual, output projection, norm, feed-forward, residual: x and attended (T, W) -> (T, W).

    feed_forward: None for the stream's own, the gated MLP.
    """
    x = graph.op("Add", x, linear(graph, f"{layer}.self_attn.o_proj{stream.suffix}", attended))
    normed = _stream_norm(graph, f"{layer}.post_attention_layernorm{stream.suffix}", stream, x)
    if feed_forward is not None:
        return graph.op("Add", x, feed_forward(normed))
    return graph.op("Add", x, gated_mlp(graph, f"{layer}.mlp{stream.suffix}", stream.config.activation, normed))


def final_norm(graph: Graph, stream: Stream, x: str) -> str:
    """The norm after the last layer."""
    return _stream_norm(graph, f"language_model.model.norm{stream.suffix}", stream, x)


def gated_mlp(graph: Graph, name: str, activation: str, x: str) -> str:
    """down(activation(gate(x)) * up(x))."""
    both = merged_linear(graph, f"{name}.gate_up_proj", [f"{name}.gate_proj", f"{name}.up_proj"], x)
    width = graph.parameters[f"{name}.gate_proj.weight"].shape[0]
    gate, up = graph.ops("Split", both, graph.ints([width, width]), outputs=2, axis=-1)
    return linear(graph, f"{name}.down_proj", graph.op("Mul", ACTIVATIONS[activation](graph, gate), up))


def _stream_norm(graph: Graph, name: str, stream: Stream, x: str) -> str:
    return rms_norm(graph, x, graph.parameter(f"{name}.weight"), stream.config.norm_epsilon)
