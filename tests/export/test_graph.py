"""The graph under construction and its weight file."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from onbeat.export.graph import INLINE_BYTES, PAGE, Graph, WeightFile


@pytest.fixture
def weights(tmp_path: Path) -> WeightFile:
    return WeightFile(tmp_path / "weights.bin")


def run(graph: Graph, weights: WeightFile, folder: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    weights.close()
    path = folder / "graph.onnx"
    path.write_bytes(graph.model().SerializeToString())
    onnx.checker.check_model(path)
    return onnxruntime.InferenceSession(str(path)).run(None, inputs)


def test_weights_are_found_again(weights: WeightFile, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small, large, other = (rng.standard_normal(n).astype(np.float32) for n in (3, INLINE_BYTES, INLINE_BYTES))
    graph = Graph("test", {"small": small, "large": large}, weights)
    for name in ("small", "large"):
        graph.output(graph.parameter(name), f"out_{name}", np.float32, [len(graph.parameters[name])])
    graph.output(graph.weight("other", lambda: other), "out_other", np.float32, [len(other)])
    found = run(graph, weights, tmp_path)
    assert all(np.array_equal(*pair) for pair in zip(found, (small, large, other), strict=True))


def test_one_name_is_stored_once_over_graphs(weights: WeightFile, tmp_path: Path) -> None:
    array = np.ones(PAGE, np.float32)
    for name in ("a", "b"):
        graph = Graph(name, {"shared": array}, weights)
        assert graph.parameter("shared") == graph.parameter("shared")
    weights.close()
    assert (tmp_path / "weights.bin").stat().st_size == array.nbytes


def test_one_name_cannot_mean_two_arrays(weights: WeightFile) -> None:
    weights.place("w", np.ones(4, np.float32))
    with pytest.raises(AssertionError):
        weights.place("w", np.ones(5, np.float32))


def test_weights_start_on_a_page(weights: WeightFile) -> None:
    placements = [weights.place(str(n), np.ones(n, np.float32)) for n in (300, 1, 5000)]
    assert [p.offset % PAGE for p in placements] == [0, 0, 0]
    assert [p.length for p in placements] == [1200, 4, 20000]


def test_scalars_stay_scalars(weights: WeightFile, tmp_path: Path) -> None:
    graph = Graph("test", {}, weights)
    x = graph.input("x", np.float32, ["rows", 2])
    graph.output(graph.op("Gather", x, graph.ints(1), axis=0), "row", np.float32, [2])
    graph.output(graph.op("Mul", x, graph.floats(2.0)), "double", np.float32, ["rows", 2])
    row, double = run(graph, weights, tmp_path, x=np.arange(6, dtype=np.float32).reshape(3, 2))
    assert row.tolist() == [2.0, 3.0]
    assert double.shape == (3, 2)


def test_nodes_carry_the_path_of_their_scopes(weights: WeightFile) -> None:
    graph = Graph("test", {}, weights)
    x = graph.input("x", np.float32, [2])
    with graph.scope("layer_03"), graph.scope("gate"):
        inside = graph.op("Relu", x)
    assert inside.startswith("layer_03/gate/Relu")
    assert "/" not in graph.op("Relu", x)
    weights.close()
