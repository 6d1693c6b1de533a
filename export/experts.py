"""Mixture of Flow as ONNX nodes: what the prefix says to every layer's router, and the chosen experts in the flow.

E experts of a layer, K chosen, C action rows, W and F widths of the action stream and its feed-forward, H width of the
understanding stream. n experts side by side are one feed-forward of width n F, whose last product sums them.
Routed by observation, the prefix graph publishes the choice, and the flow graph gathers the K chosen experts' weights
once for all its steps and reads no others. Routed by token, the prefix graph publishes scores, every row chooses in
every step, and all experts are computed: together, the rows take nearly all of them anyway.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onbeat.export import layers
from onbeat.export.graph import Graph
from onbeat.export.layers import Parameters
from onbeat.training.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Mixture:
    """The feed-forward of one layer's action rows. gate_up (n 2 F, W) and down (n F, W): of the n experts computed.

    scores: (E,), the prefix's part where the rows choose; None where the prefix has, with its weights in `down`.
    """

    layer: str
    gate_up: str
    down: str
    scores: str | None = None


def publish_route(graph: Graph, decoder: DecoderConfig, index: int, last: str) -> None:
    """Name what layer `index` takes from the last prefix token (1, H), as it enters the layer, after the norm."""
    experts = decoder.experts
    assert experts is not None
    with graph.scope("router"):
        scores = layers.linear(graph, f"language_model.model.layers.{index}.router_mot_gen", last)
        scores = graph.op("Squeeze", scores, graph.ints([0]))
        if experts.routing == "token":
            graph.output(scores, f"router_{index:02d}", np.float32, [experts.count])
            return
        best, chosen = graph.ops("TopK", scores, graph.ints([experts.top_k]), outputs=2, axis=-1)
        weights = graph.op("Softmax", best, axis=-1)
    graph.output(chosen, f"experts_{index:02d}", np.int64, [experts.top_k])
    graph.output(weights, f"expert_weights_{index:02d}", np.float32, [experts.top_k])


def take_routes(graph: Graph, decoder: DecoderConfig) -> list[Mixture | None]:
    """Declare what the prefix published as inputs: per layer its mixture, None where it has no experts."""
    return [_take_route(graph, decoder, n) if decoder.is_routed(n) else None for n in range(decoder.layers)]


def _take_route(graph: Graph, decoder: DecoderConfig, index: int) -> Mixture:
    experts, layer = decoder.experts, f"language_model.model.layers.{index}"
    assert experts is not None
    if experts.routing == "token":
        scores = graph.input(f"router_{index:02d}", np.float32, [experts.count])
        return Mixture(layer, *_side_by_side(graph, layer, experts.count), scores)
    chosen = graph.input(f"experts_{index:02d}", np.int64, [experts.top_k])
    weights = graph.input(f"expert_weights_{index:02d}", np.float32, [experts.top_k])
    with graph.scope(f"layer_{index:02d}/experts"):
        gate_up, down = (graph.op("Gather", each, chosen, axis=0) for each in _stacked(graph, layer, experts.count))
        down = graph.op("Mul", down, graph.op("Unsqueeze", weights, graph.ints([1, 2])))
        rows = graph.ints([-1, decoder.gen.width])
        return Mixture(layer, graph.op("Reshape", gate_up, rows), graph.op("Reshape", down, rows))


def _stacked(graph: Graph, layer: str, count: int) -> tuple[str, str]:
    """All experts' weights of a layer, to choose from: (E, 2 F, W) and (E, F, W)."""
    name, parameters = f"{layer}.experts_mot_gen", graph.parameters
    gate_up = graph.weight(f"{name}.gate_up_proj.weight", lambda: _stack_gate_up(parameters, name, count))
    return gate_up, graph.weight(f"{name}.down_proj.weight^T", lambda: _stack_down(parameters, name, count))


def _side_by_side(graph: Graph, layer: str, count: int) -> tuple[str, str]:
    """The same as one wide feed-forward: (E 2 F, W) and (E F, W)."""
    name, parameters = f"{layer}.experts_mot_gen", graph.parameters
    gate_up = np.concatenate(_stack_gate_up(parameters, name, count))
    down = np.concatenate(_stack_down(parameters, name, count))
    return graph.weight(f"{name}.gate_up_proj.weight", gate_up), graph.weight(f"{name}.down_proj.weight^T", down)


def _stack_gate_up(parameters: Parameters, name: str, count: int) -> NDArray[np.float32]:
    pairs = [[parameters[f"{name}.{k}.{part}_proj.weight"] for part in ("gate", "up")] for k in range(count)]
    return np.stack([np.concatenate(pair) for pair in pairs])


def _stack_down(parameters: Parameters, name: str, count: int) -> NDArray[np.float32]:
    return np.stack([parameters[f"{name}.{k}.down_proj.weight"].T for k in range(count)])


def mix(graph: Graph, decoder: DecoderConfig, mixture: Mixture, x: str) -> str:
    """The weighted sum of the experts of x (C, W), as the feed-forward of finish_layer."""
    width = decoder.gen.ffn_width
    with graph.scope("experts"):
        both = graph.op("Reshape", graph.op("Gemm", x, mixture.gate_up, transB=1), graph.ints([0, -1, 2 * width]))
        gate, up = graph.ops("Split", both, graph.ints([width, width]), outputs=2, axis=-1)
        hidden = graph.op("Mul", layers.ACTIVATIONS[decoder.gen.activation](graph, gate), up)
        if mixture.scores is not None:
            hidden = graph.op("Mul", hidden, _row_weights(graph, decoder, mixture, x))
        return graph.op("MatMul", graph.op("Flatten", hidden, axis=1), mixture.down)


def _row_weights(graph: Graph, decoder: DecoderConfig, mixture: Mixture, x: str) -> str:
    """Every row's weights of all experts, 0 for those it did not choose: (C, E, 1)."""
    experts = decoder.experts
    assert experts is not None
    assert mixture.scores is not None
    own = layers.linear(graph, f"{mixture.layer}.router_mot_gen.token", x)
    scores = graph.op("Add", own, mixture.scores)
    best, chosen = graph.ops("TopK", scores, graph.ints([experts.top_k]), outputs=2, axis=-1)
    none = graph.op("Mul", scores, graph.floats(0))
    spread = graph.op("ScatterElements", none, chosen, graph.op("Softmax", best, axis=-1), axis=1)
    return graph.op("Unsqueeze", spread, graph.ints([2]))
