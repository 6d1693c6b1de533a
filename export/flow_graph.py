"""The flow graph: the prefix's keys and values, noise, a committed prefix and guidance in; one chunk of actions out.

I iterations, T flow steps, C chunk rows, E width of the action stream, H of the understanding stream, M directions,
k key-value heads, d head width, N prefix tokens. All steps of all iterations are unrolled and share their weights.
What depends on nothing but the step's time is folded into constants: W1 into the action half of W2, and the time half
of W2 into a bias per step.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from onbeat.embodiment.slots import UNIFIED_DIM
from onbeat.export import experts, layers
from onbeat.export.experts import Mixture
from onbeat.export.graph import END, Graph
from onbeat.export.layers import Parameters, action_stream
from onbeat.runtime.engine import SamplerSpec
from onbeat.training.config import PolicyConfig
from onbeat.training.model import gating
from onbeat.training.model.heads import embed_time
from onbeat.training.model.sampler import CLEAN_BUCKET, pull_limit, time_buckets


@dataclass(frozen=True, slots=True)
class Cache:
    """The prefix as the flow sees it: keys, values and experts per layer, the action rows' rotation, and their mask."""

    keys: list[str]
    values: list[str]
    mixtures: list[Mixture | None]
    tables: tuple[str, str]
    mask: str


@dataclass(frozen=True, slots=True)
class Prefix:
    """The committed rows: `frozen` (C, 1) says which, `actions` (C, 200) what they are."""

    frozen: str
    actions: str


@dataclass(frozen=True, slots=True)
class Guide:
    """The pull towards the previous chunk: `weights` (C, 1) and `beta`, a scalar. See runtime.engine.Guidance."""

    weights: str
    beta: str


@dataclass(frozen=True, slots=True)
class FlowWriter:
    """One flow graph in the making, and what every step of it needs."""

    graph: Graph
    config: PolicyConfig
    sampler: SamplerSpec
    cache: Cache
    prefix: Prefix
    guide: Guide
    directions: str | None


def add_flow(
    graph: Graph, config: PolicyConfig, sampler: SamplerSpec, resting: NDArray[np.bool_] | None = None
) -> None:
    """Add the whole sampler, inputs and outputs included. resting: (200,) bool, slots that start at 0, not at noise."""
    chunk = config.chunk
    keys, values = _cache_inputs(graph, config)
    mixtures = experts.take_routes(graph, config.decoder)
    noise = graph.input("noise", np.float32, [sampler.iterations, chunk, UNIFIED_DIM])
    directions = _directions_input(graph, config, sampler)
    prev_chunk = graph.input("prev_chunk", np.float32, [chunk, UNIFIED_DIM])
    delay = graph.input("delay", np.int64, [])
    with graph.scope("positions"):
        tables, mask = _places(graph, config, keys[0])
    with graph.scope("prefix"):
        rows = graph.weight("rows", np.arange(chunk, dtype=np.int64)[:, None])
        prefix = Prefix(frozen=graph.op("Less", rows, delay), actions=prev_chunk)
    cache = Cache(keys, values, mixtures, tables, mask)
    writer = FlowWriter(graph, config, sampler, cache, prefix, _guide_inputs(graph, chunk), directions)
    actions, gates, costs = _iterations(writer, noise if resting is None else _quiet(graph, noise, resting))
    graph.output(actions, "actions", np.float32, [chunk, UNIFIED_DIM])
    if gates:
        _publish_gates(writer, "gate", gates)
        _publish_gates(writer, "cost", costs)


def _quiet(graph: Graph, noise: str, resting: NDArray[np.bool_]) -> str:
    """The noise (I, C, 200) with 0 in the slots that rest."""
    return graph.op("Where", graph.weight("resting_slots", resting), graph.floats(0), noise)


def _cache_inputs(graph: Graph, config: PolicyConfig) -> tuple[list[str], list[str]]:
    """Keys and values, layer by layer."""
    shape = [config.decoder.kv_heads, "tokens", config.decoder.head_dim]
    pairs = [
        [graph.input(f"{kind}_{index:02d}", np.float32, shape) for kind in ("key", "value")]
        for index in range(config.decoder.layers)
    ]
    return [key for key, _ in pairs], [value for _, value in pairs]


def _guide_inputs(graph: Graph, chunk: int) -> Guide:
    weights = graph.input("guidance_weights", np.float32, [chunk])
    beta = graph.input("guidance_beta", np.float32, [])
    with graph.scope("guidance"):
        return Guide(graph.op("Unsqueeze", weights, graph.ints([1])), beta)


def _directions_input(graph: Graph, config: PolicyConfig, sampler: SamplerSpec) -> str | None:
    if sampler.gate != "directions":
        return None
    shape = [sampler.iterations - 1, sampler.flow_steps, sampler.gate_directions, config.decoder.und.width]
    return graph.input("directions", np.float32, shape)


def _places(graph: Graph, config: PolicyConfig, key: str) -> tuple[tuple[str, str], str]:
    """The action rows' rotation and mask: they stand right behind the N prefix rows of `key` (k, N, d), see all of
    those, and each other causally."""
    count = graph.op("Squeeze", graph.op("Shape", key, start=1, end=2))
    end = graph.op("Add", count, graph.ints(config.chunk))
    positions = graph.op("Range", count, end, graph.ints(1))
    everything = graph.op("Range", graph.ints(0), end, graph.ints(1))
    mask = layers.causal_mask(graph, config.decoder, positions, everything)
    return layers.rope_tables(graph, positions), mask


def _iterations(writer: FlowWriter, noise: str) -> tuple[str, list[str], list[str]]:
    """A plain sample, then refinements that start from noise of their own and are gated by the result before."""
    result, gates, costs = "", [], []
    for iteration in range(writer.sampler.iterations):
        with writer.graph.scope(f"iteration_{iteration}"):
            anchor = _anchor(writer, result) if iteration else None
            result = _integrate(writer, iteration, _noise(writer, noise, iteration), anchor, gates, costs)
    return result, gates, costs


def _noise(writer: FlowWriter, noise: str, iteration: int) -> str:
    return writer.graph.op("Gather", noise, writer.graph.ints(iteration), axis=0)


def _integrate(
    writer: FlowWriter, iteration: int, x: str, anchor: str | None, gates: list[str], costs: list[str]
) -> str:
    """Euler steps from x (C, 200) at time 0 to time 1, the committed rows put back before and after each."""
    graph, steps = writer.graph, writer.sampler.flow_steps
    buckets = time_buckets(steps)
    x = commit(writer, x)
    for step in range(steps):
        with graph.scope(f"step_{step}"):
            features = encode_actions(writer, x, time_bias(writer, buckets[step]))
            if anchor is None:
                features = first_pass(writer, features)
            else:
                directions = _step_directions(writer, iteration, step)
                features, gate, cost = refine(writer, features, anchor, directions)
                gates.append(gate)
                costs.append(cost)
            velocity = pull(writer, predict_velocity(writer, features), x, step / steps)
            x = commit(writer, graph.op("Add", x, graph.op("Div", velocity, graph.floats(steps))))
    return x


def commit(writer: FlowWriter, x: str) -> str:
    """Overwrite the committed rows of x (C, 200)."""
    return writer.graph.op("Where", writer.prefix.frozen, writer.prefix.actions, x)


def pull(writer: FlowWriter, velocity: str, x: str, time: float) -> str:
    """The velocity (C, 200) at (x, time) with the guidance; where its gain is 0, the same bits as without."""
    graph, guide = writer.graph, writer.guide
    with graph.scope("pull"):
        limit = graph.floats(min(pull_limit(time), float(np.finfo(np.float32).max)))
        gain = graph.op("Mul", guide.weights, graph.op("Min", guide.beta, limit))
        reached = graph.op("Add", x, graph.op("Mul", velocity, graph.floats(1 - time)))
        missing = graph.op("Sub", writer.prefix.actions, reached)
        pulled = graph.op("Add", velocity, graph.op("Mul", gain, missing))
        return graph.op("Where", graph.op("Greater", gain, graph.floats(0)), pulled, velocity)


def bucket_bias(parameters: Parameters, bucket: int) -> NDArray[np.float32]:
    """What W2 adds for time `bucket` and for the bias of W1: (E,)."""
    w2, b1 = parameters["action_encoder.W2.weight"].astype(np.float64), parameters["action_encoder.W1.bias"]
    width = b1.shape[0]
    time = embed_time(torch.tensor(bucket), width).numpy()
    return (w2[:, :width] @ b1 + w2[:, width:] @ time + parameters["action_encoder.W2.bias"]).astype(np.float32)


def folded_action_weight(parameters: Parameters) -> NDArray[np.float32]:
    """The action half of W2 times W1, transposed: (200, E)."""
    w1, w2 = (parameters[f"action_encoder.{name}.weight"].astype(np.float64) for name in ("W1", "W2"))
    return (w2[:, : w1.shape[0]] @ w1).T.astype(np.float32)


def time_bias(writer: FlowWriter, bucket: int) -> str:
    """The bias of every row at time `bucket`: (C, E), committed rows at theirs."""
    biases = (_bucket_weight(writer, b) for b in (CLEAN_BUCKET, bucket))
    return writer.graph.op("Where", writer.prefix.frozen, *biases)


def _bucket_weight(writer: FlowWriter, bucket: int) -> str:
    return writer.graph.weight(f"action_encoder.W2.bias@{bucket}", lambda: bucket_bias(writer.graph.parameters, bucket))


def encode_actions(writer: FlowWriter, x: str, bias: str) -> str:
    """x (C, 200) -> features (C, E)."""
    graph = writer.graph
    folded = graph.weight("action_encoder.W2*W1.weight^T", lambda: folded_action_weight(graph.parameters))
    hidden = layers.silu(graph, graph.op("Add", graph.op("MatMul", x, folded), bias))
    return layers.linear(graph, "action_encoder.W3", hidden)


def predict_velocity(writer: FlowWriter, features: str) -> str:
    """One pass of the action stream over the cache: features (C, E) -> velocity (C, 200)."""
    graph, stream = writer.graph, action_stream(writer.config.decoder)
    x = features
    for index in range(writer.config.decoder.layers):
        with graph.scope(f"layer_{index:02d}"):
            x = _flow_layer(writer, index, x)
    return layers.relu_mlp(graph, "action_decoder", layers.final_norm(graph, stream, x))


def _flow_layer(writer: FlowWriter, index: int, x: str) -> str:
    graph, cache = writer.graph, writer.cache
    heads = writer.config.decoder
    stream = action_stream(heads)
    layer = f"language_model.model.layers.{index}"
    normed = layers.input_norm(graph, layer, stream, x)
    query, key, value = layers.project_heads(graph, layer, stream, heads, normed)
    query, key = (layers.rotate(graph, rows, cache.tables, heads.head_dim) for rows in (query, key))
    keys = graph.op("Concat", cache.keys[index], layers.heads_first(graph, key), axis=1)
    values = graph.op("Concat", cache.values[index], layers.heads_first(graph, value), axis=1)
    mixed = layers.attend(graph, heads, query, keys, values, cache.mask)
    mixture = cache.mixtures[index]
    choose = None if mixture is None else partial(experts.mix, graph, heads, mixture)
    return layers.finish_layer(graph, layer, stream, x, mixed, choose)


def first_pass(writer: FlowWriter, features: str) -> str:
    """The plain iteration's features: as they are, or through both projections when the checkpoint trained that way."""
    gate = writer.config.gate
    if not gate.present or gate.first_pass == "published":
        return features
    lifted = layers.linear(writer.graph, "action_to_vlm_proj", features)
    return layers.linear(writer.graph, "vlm_to_action_proj", lifted)


def _anchor(writer: FlowWriter, clean: str) -> str:
    """The gate's reference from the result before: mean over rows of LN(action_proj(encoding)), (1, H)."""
    graph = writer.graph
    with graph.scope("anchor"):
        encoded = encode_actions(writer, clean, _bucket_weight(writer, writer.config.gate.anchor_bucket))
        projected = layers.linear(graph, "mpg.action_proj", encoded)
        normed = layers.plain_layer_norm(graph, projected, writer.config.decoder.und.width, gating.NORM_EPSILON)
        return graph.op("ReduceMean", normed, graph.ints([0]), keepdims=1)


def _step_directions(writer: FlowWriter, iteration: int, step: int) -> str | None:
    """The raw directions of one step: (M, H)."""
    if writer.directions is None:
        return None
    rounds = writer.graph.op("Gather", writer.directions, writer.graph.ints(iteration - 1), axis=0)
    return writer.graph.op("Gather", rounds, writer.graph.ints(step), axis=0)


def refine(writer: FlowWriter, features: str, anchor: str, directions: str | None) -> tuple[str, str, str]:
    """Manifold-preserving gating: features (C, E) -> refined features (C, E), gate and cost (scalars)."""
    graph, sampler = writer.graph, writer.sampler
    with graph.scope("gate"):
        projected = layers.linear(graph, "action_to_vlm_proj", features)
        seen = layers.linear(graph, "mpg.obs_proj", _with_state_row(writer, projected))
        cost = _cost(writer, seen, anchor, directions)
        gate = graph.op("Exp", graph.op("Div", graph.op("Neg", cost), graph.floats(sampler.gate_temperature)))
        rows = graph.op("Mul", _without_state_row(graph, seen), gate)
        enhanced = layers.linear(graph, "mpg.enhancement_proj", rows)
        scaled = graph.op("Mul", enhanced, graph.floats(sampler.gate_lambda))
        back = layers.linear(graph, "vlm_to_action_proj", graph.op("Add", projected, scaled))
    return back, gate, cost


def _with_state_row(writer: FlowWriter, projected: str) -> str:
    """The published code leaves the state's row zero here; it still counts in the cost."""
    zeros = writer.graph.weight("zero_row", np.zeros((1, writer.config.decoder.und.width), np.float32))
    return writer.graph.op("Concat", zeros, projected, axis=0)


def _without_state_row(graph: Graph, rows: str) -> str:
    return graph.op("Slice", rows, graph.ints([1]), graph.ints([END]), graph.ints([0]))


def _cost(writer: FlowWriter, seen: str, anchor: str, directions: str | None) -> str:
    """Sliced squared distance of LN(seen) from the anchor: over the given directions, or its expectation (scalar)."""
    graph, width = writer.graph, writer.config.decoder.und.width
    away = graph.op("Sub", layers.plain_layer_norm(graph, seen, width, gating.NORM_EPSILON), anchor)
    if directions is not None:
        away = graph.op("MatMul", away, graph.op("Transpose", _unit(graph, directions), perm=[1, 0]))
    mean = graph.op("ReduceMean", graph.op("Mul", away, away), keepdims=0)
    return mean


def _unit(graph: Graph, directions: str) -> str:
    """(M, H) with rows of length 1."""
    return graph.op("Div", directions, graph.op("ReduceL2", directions, graph.ints([-1]), keepdims=1))


def _publish_gates(writer: FlowWriter, name: str, scalars: list[str]) -> None:
    """One number per step of every refinement: (I - 1, T)."""
    graph, shape = writer.graph, [writer.sampler.iterations - 1, writer.sampler.flow_steps]
    rows = [graph.op("Unsqueeze", scalar, graph.ints([0])) for scalar in scalars]
    graph.output(graph.op("Reshape", graph.op("Concat", *rows, axis=0), graph.ints(shape)), name, np.float32, shape)
