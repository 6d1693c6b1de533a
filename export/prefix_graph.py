"""The prefix graph: camera views, token ids and state in; the keys, values and choice of experts of every layer out.

V views, S image side, N prefix tokens, k key-value heads, d head width, P patches per side.
Inside, and in the cache, the rows are ordered text and images first, the state token last: attention does not care for
the order of its keys (their positions are in the rotation), and the two streams stay contiguous.
"""

from dataclasses import dataclass

import numpy as np

from onbeat.embodiment.slots import UNIFIED_DIM
from onbeat.export import experts, layers
from onbeat.export.graph import END, Graph
from onbeat.export.layers import Stream, action_stream, understanding_stream
from onbeat.kernels.image import IMAGENET_MEAN, IMAGENET_STD
from onbeat.training.config import PolicyConfig
from onbeat.training.model import connector


@dataclass(frozen=True, slots=True)
class PrefixLayout:
    """Where things stand in the prefix: it starts the same way for every instruction, so the graph has it built in."""

    views: int
    image_start: int
    state_index: int


def add_prefix(graph: Graph, config: PolicyConfig, layout: PrefixLayout) -> None:
    """Add the whole prefix pass, inputs and outputs included."""
    side = config.vision.image_size
    views = graph.input("views", np.uint8, [layout.views, side, side, 3])
    token_ids = graph.input("token_ids", np.int64, ["tokens"])
    state = graph.input("state", np.float32, [UNIFIED_DIM])
    with graph.scope("vision"):
        images = connect(graph, config, encode_views(graph, config, layout.views, views))
    with graph.scope("embed"):
        text = embed(graph, config, layout, token_ids, images)
        state_row = layers.relu_mlp(graph, "proprio_encoder_robot", graph.op("Unsqueeze", state, graph.ints([0])))
    with graph.scope("positions"):
        positions = row_positions(graph, layout, token_ids)
        tables = layers.rope_tables(graph, positions)
        mask = layers.causal_mask(graph, config.decoder, positions, positions)
    _run_layers(graph, config, text, state_row, tables, mask)


def encode_views(graph: Graph, config: PolicyConfig, views: int, pixels: str) -> str:
    """(V, S, S, 3) uint8 -> (V, P * P, W): the vision transformer up to the selected layer, class token dropped."""
    x = _patches(graph, views, _normalise(graph, pixels))
    for index in range(config.vision.depth):
        with graph.scope(f"layer_{index:02d}"):
            x = _vision_layer(graph, config, f"vit_model.encoder.layers.{index}", x)
    return graph.op("Slice", x, graph.ints([1]), graph.ints([END]), graph.ints([1]))


def _normalise(graph: Graph, pixels: str) -> str:
    """uint8 (V, S, S, 3) -> float (V, 3, S, S), as ImageNet networks expect it."""
    planes = graph.op("Transpose", graph.op("Cast", pixels, to=1), perm=[0, 3, 1, 2])
    unit = graph.op("Div", planes, graph.floats(255.0))
    centred = graph.op("Sub", unit, graph.floats(IMAGENET_MEAN.reshape(1, 3, 1, 1)))
    return graph.op("Div", centred, graph.floats(IMAGENET_STD.reshape(1, 3, 1, 1)))


def _patches(graph: Graph, views: int, planes: str) -> str:
    """(V, 3, S, S) -> (V, 1 + P * P, W): patch embedding, class token in front, positions added."""
    name = "vit_model.embeddings"
    kernel, bias = (graph.parameters[f"{name}.patch_embedding.{part}"] for part in ("weight", "bias"))
    stored = [graph.weight(f"{name}.patch_embedding.{part}", w) for part, w in (("weight", kernel), ("bias", bias))]
    grid = graph.op("Conv", planes, *stored, strides=list(kernel.shape[2:]))
    rows = graph.op("Reshape", grid, graph.ints([views, kernel.shape[0], -1]))
    rows = graph.op("Transpose", rows, perm=[0, 2, 1])
    first = np.broadcast_to(graph.parameters[f"{name}.class_embedding"], (views, 1, kernel.shape[0]))
    rows = graph.op("Concat", graph.weight(f"{name}.class_embedding/views", first), rows, axis=1)
    return graph.op("Add", rows, graph.parameter(f"{name}.position_embedding"))


def _vision_layer(graph: Graph, config: PolicyConfig, layer: str, x: str) -> str:
    """Pre-norm attention and MLP, each scaled per channel before its residual."""
    normed = layers.layer_norm(graph, f"{layer}.norm1", x, config.vision.norm_epsilon)
    attended = _vision_attention(graph, config, layer, normed)
    x = graph.op("Add", x, graph.op("Mul", attended, graph.parameter(f"{layer}.ls1")))
    normed = layers.layer_norm(graph, f"{layer}.norm2", x, config.vision.norm_epsilon)
    hidden = graph.op("Gelu", layers.linear(graph, f"{layer}.mlp.fc1", normed))
    out = layers.linear(graph, f"{layer}.mlp.fc2", hidden)
    return graph.op("Add", x, graph.op("Mul", out, graph.parameter(f"{layer}.ls2")))


def _vision_attention(graph: Graph, config: PolicyConfig, layer: str, x: str) -> str:
    width = graph.parameters[f"{layer}.attn.proj.weight"].shape[0]
    head = width // config.vision.heads
    merged = layers.linear(graph, f"{layer}.attn.qkv", x)
    rows = graph.op("Reshape", merged, graph.ints([0, 0, 3, config.vision.heads, head]))
    parts = graph.op("Transpose", rows, perm=[2, 0, 3, 1, 4])
    query, key, value = (graph.op("Gather", parts, graph.ints(k), axis=0) for k in range(3))
    query = graph.op("Mul", query, graph.floats(head**-0.5))
    scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
    joined = graph.op("Reshape", graph.op("Transpose", mixed, perm=[0, 2, 1, 3]), graph.ints([0, 0, width]))
    return layers.linear(graph, f"{layer}.attn.proj", joined)


def connect(graph: Graph, config: PolicyConfig, patches: str) -> str:
    """(V, P * P, W) -> (V * tokens, H): pixel shuffle, then the connector's MLP."""
    rows = _pixel_shuffle(graph, config, patches)
    normed = layers.layer_norm(graph, "connector.mlp1.0", rows, connector.NORM_EPSILON)
    hidden = graph.op("Gelu", layers.linear(graph, "connector.mlp1.1", normed))
    return layers.linear(graph, "connector.mlp1.3", hidden)


def _pixel_shuffle(graph: Graph, config: PolicyConfig, patches: str) -> str:
    """f x f neighbours side by side in the channels, row by row: (V, P * P, W) -> (V * (P / f)^2, f * f * W)."""
    f, width = config.vision.shuffle, config.vision.width
    cells = config.vision.grid // f
    grid = graph.op("Reshape", patches, graph.ints([-1, cells, f, cells, f, width]))
    return graph.op("Reshape", graph.op("Transpose", grid, perm=[0, 1, 3, 2, 4, 5]), graph.ints([-1, f * f * width]))


def embed(graph: Graph, config: PolicyConfig, layout: PrefixLayout, ids: str, images: str) -> str:
    """Understanding rows in order, without the state's: embedded text with the image rows in their place (N - 1, H)."""
    image_end = layout.image_start + layout.views * config.vision.tokens_per_view
    pieces = [(0, layout.image_start), (image_end, layout.state_index), (layout.state_index + 1, END)]
    name = "language_model.model.embed_tokens.weight"
    table = graph.parameter(name)
    before, between, after = (graph.op("Gather", table, cut(graph, ids, *piece), axis=0) for piece in pieces)
    return graph.op("Concat", before, images, between, after, axis=0)


def row_positions(graph: Graph, layout: PrefixLayout, token_ids: str) -> str:
    """Position of every row (N,) int64: all but the state's in order, then the state's."""
    count = graph.op("Squeeze", graph.op("Shape", token_ids))
    in_order = graph.op("Range", graph.ints(0), count, graph.ints(1))
    pieces = [(0, layout.state_index), (layout.state_index + 1, END), (layout.state_index, layout.state_index + 1)]
    return graph.op("Concat", *[cut(graph, in_order, *piece) for piece in pieces], axis=0)


def cut(graph: Graph, x: str, start: int, end: int) -> str:
    """x[start:end] along the first axis."""
    return graph.op("Slice", x, graph.ints([start]), graph.ints([end]), graph.ints([0]))


def _run_layers(
    graph: Graph,
    config: PolicyConfig,
    text: str,
    state: str,
    tables: tuple[str, str],
    mask: str,
) -> None:
    """Every layer over both streams; each publishes its keys and values."""
    und, gen = understanding_stream(config.decoder), action_stream(config.decoder)
    for index in range(config.decoder.layers):
        layer = f"language_model.model.layers.{index}"
        with graph.scope(f"layer_{index:02d}"):
            last = index == config.decoder.layers - 1
            rows = [(stream, layers.input_norm(graph, layer, stream, x)) for stream, x in ((und, text), (gen, state))]
            if config.decoder.is_routed(index):
                experts.publish_route(graph, config.decoder, index, cut(graph, rows[0][1], -1, END))
            query, key, value = _project(graph, config, layer, rows, keys_only=last)
            key = layers.heads_first(graph, layers.rotate(graph, key, tables, config.decoder.head_dim))
            value = layers.heads_first(graph, value)
            publish_cache(graph, config, index, key, value)
            if query is None:
                return
            query = layers.rotate(graph, query, tables, config.decoder.head_dim)
            mixed = layers.attend(graph, config.decoder, query, key, value, mask)
            text = layers.finish_layer(graph, layer, und, text, cut(graph, mixed, 0, -1))
            state = layers.finish_layer(graph, layer, gen, state, cut(graph, mixed, -1, END))


def _project(
    graph: Graph,
    config: PolicyConfig,
    layer: str,
    rows: list[tuple[Stream, str]],
    *,
    keys_only: bool,
) -> tuple[str | None, str, str]:
    """Both streams' normed rows through their own projections, joined row-wise: query (or None), key, value."""
    project = layers.project_key_value if keys_only else layers.project_heads
    parts = [project(graph, layer, stream, config.decoder, normed) for stream, normed in rows]
    joined = [graph.op("Concat", *part, axis=0) for part in zip(*parts, strict=True)]
    return (None, joined[0], joined[1]) if keys_only else (joined[0], joined[1], joined[2])


def publish_cache(graph: Graph, config: PolicyConfig, index: int, key: str, value: str) -> None:
    """Name one layer's keys and values (k, N, d) as outputs."""
    shape = [config.decoder.kv_heads, "tokens", config.decoder.head_dim]
    for name, tensor in ((f"key_{index:02d}", key), (f"value_{index:02d}", value)):
        graph.output(tensor, name, np.float32, shape)
