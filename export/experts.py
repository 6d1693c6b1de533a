"""Mixture of Flow as ONNX nodes: what the prefix says to every layer's router, and the chosen experts in the flow.

E experts of a layer, K chosen, C action rows, W and F widths of the action stream and its feed-forward, H width of the
understanding stream. Routed by observation, the prefix graph publishes the choice, and the flow graph gathers the K
chosen experts' weights once for all its steps and reads no others. Routed by token, the prefix graph publishes scores,
every row chooses in every step, and all experts are computed: together, the rows take nearly all of them anyway.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onbeat.export import layers
from onbeat.export.graph import Graph
from onbeat.training.config import DecoderConfig, ExpertsConfig


@dataclass(frozen=True, slots=True)
class Mixture:
    """The feed-forward of one layer's action rows. gate_up (n, W, 2 F) and down (n, F, W): of the n experts computed.

    weights: (K, 1, 1) where the prefix has chosen. scores: (E,) where the rows choose, with the prefix's part.
    """

    layer: str
    gate_up: str
    down: str
    weights: str | None = None
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
    gate_up, down = _stacked(graph, layer, experts)
    if experts.routing == "token":
        scores = graph.input(f"router_{index:02d}", np.float32, [experts.count])
        return Mixture(layer, gate_up, down, scores=scores)
    chosen = graph.input(f"experts_{index:02d}", np.int64, [experts.top_k])
    weights = graph.input(f"expert_weights_{index:02d}", np.float32, [experts.top_k])
    with graph.scope(f"layer_{index:02d}/experts"):
        gate_up, down = (graph.op("Gather", stacked, chosen, axis=0) for stacked in (gate_up, down))
        return Mixture(layer, gate_up, down, weights=graph.op("Unsqueeze", weights, graph.ints([1, 2])))


def _stacked(graph: Graph, layer: str, experts: ExpertsConfig) -> tuple[str, str]:
    """All experts' weights of a layer: (E, W, 2 F) and (E, F, W)."""

    def stack(*parts: str) -> NDArray[np.float32]:
        each = [[graph.parameters[f"{layer}.experts_mot_gen.{k}.{part}.weight"].T for part in parts] for k in numbers]
        return np.stack([np.concatenate(matrices, axis=1) for matrices in each])

    numbers, name = range(experts.count), f"{layer}.experts_mot_gen"
    gate_up = graph.weight(f"{name}.gate_up_proj.weight^T", lambda: stack("gate_proj", "up_proj"))
    return gate_up, graph.weight(f"{name}.down_proj.weight^T", lambda: stack("down_proj"))


def mix(graph: Graph, decoder: DecoderConfig, mixture: Mixture, x: str) -> str:
    """The weighted sum of the experts of x (C, W), as the feed-forward of finish_layer."""
    with graph.scope("experts"):
        weights = mixture.weights or _row_weights(graph, decoder, mixture, x)
        both = graph.op("MatMul", x, mixture.gate_up)
        gate, up = graph.ops("Split", both, graph.ints([decoder.gen.ffn_width] * 2), outputs=2, axis=-1)
        hidden = graph.op("Mul", layers.ACTIVATIONS[decoder.gen.activation](graph, gate), up)
        weighted = graph.op("Mul", graph.op("MatMul", hidden, mixture.down), weights)
        return graph.op("ReduceSum", weighted, graph.ints([0]), keepdims=0)


def _row_weights(graph: Graph, decoder: DecoderConfig, mixture: Mixture, x: str) -> str:
    """Every row's weights of all experts, 0 for those it did not choose: (E, C, 1)."""
    experts = decoder.experts
    assert experts is not None
    assert mixture.scores is not None
    own = layers.linear(graph, f"{mixture.layer}.router_mot_gen.token", x)
    scores = graph.op("Add", own, mixture.scores)
    best, chosen = graph.ops("TopK", scores, graph.ints([experts.top_k]), outputs=2, axis=-1)
    none = graph.op("Mul", scores, graph.floats(0))
    spread = graph.op("ScatterElements", none, chosen, graph.op("Softmax", best, axis=-1), axis=1)
    return graph.op("Unsqueeze", graph.op("Transpose", spread, perm=[1, 0]), graph.ints([2]))
