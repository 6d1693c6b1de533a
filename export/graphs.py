"""From a network in PyTorch to the two ONNX files and the weights they share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from onbeat.export.flow_graph import add_flow
from onbeat.export.graph import Graph, WeightFile
from onbeat.export.layers import ROPE, Parameters
from onbeat.export.prefix_graph import PrefixLayout, add_prefix
from onbeat.runtime.engine import SamplerSpec
from onbeat.training.checkpoint import publish_name
from onbeat.training.model.adapters import fold_adapters
from onbeat.training.model.policy import Policy

PREFIX_FILE = "prefix.onnx"
FLOW_FILE = "flow.onnx"
WEIGHTS_FILE = "weights.bin"


def write_graphs(
    policy: Policy,
    layout: PrefixLayout,
    sampler: SamplerSpec,
    folder: Path,
    slots: NDArray[np.bool_] | None = None,
) -> None:
    """Write prefix.onnx, flow.onnx and weights.bin into `folder`.

    slots: (200,) bool, the robot's action slots, for networks that are given 0 in the others.
    """
    parameters, config = published_parameters(policy), policy.config
    resting = None if slots is None or config.idle_slots == "noise" else ~slots
    if resting is not None:
        parameters = {**parameters, **_rest(parameters, resting)}
    weights = WeightFile(folder / WEIGHTS_FILE)
    try:
        _write(folder / PREFIX_FILE, parameters, weights, lambda graph: add_prefix(graph, config, layout))
        _write(folder / FLOW_FILE, parameters, weights, lambda graph: add_flow(graph, config, sampler, resting))
    finally:
        weights.close()
    for name in (PREFIX_FILE, FLOW_FILE):
        onnx.checker.check_model(folder / name)


def published_parameters(policy: Policy) -> Parameters:
    """The network's parameters by published name, adapters added to what they adapt, and its rotary frequencies."""
    folded = fold_adapters(policy.state_dict())
    parameters = {publish_name(name): value.detach().numpy() for name, value in folded.items()}
    return {**parameters, ROPE: policy.language_model.rotary.inverse_frequency.numpy()}


def _rest(parameters: Parameters, resting: NDArray[np.bool_]) -> Parameters:
    """The last layer with velocity 0 in the slots that rest: what starts at 0 there stays at 0, at no cost."""
    weight, bias = (parameters[f"action_decoder.layer2.{part}"] for part in ("weight", "bias"))
    return {
        "action_decoder.layer2.weight": np.where(resting[:, None], np.float32(0), weight),
        "action_decoder.layer2.bias": np.where(resting, np.float32(0), bias),
    }


def _write(path: Path, parameters: Parameters, weights: WeightFile, add: Callable[[Graph], None]) -> None:
    graph = Graph(path.stem, parameters, weights)
    add(graph)
    path.write_bytes(graph.model().SerializeToString(deterministic=True))
