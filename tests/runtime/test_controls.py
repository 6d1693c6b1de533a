"""The control with random weights: another order of the same numbers, in a bundle that still proves itself whole."""

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onbeat.runtime.bundle import (
    CheckpointSource,
    DamagedBundle,
    GraphRecord,
    Manifest,
    NotABundle,
    Proof,
    hash_file,
    load_bundle,
    write_manifest,
)
from onbeat.runtime.controls import NoGraphReader, external_floats, redraw_weights
from onbeat.runtime.engine import PolicySpec, SamplerSpec

WEIGHTS = np.random.default_rng(1).standard_normal(96).astype(np.float32)
SHARED, OWN, INDICES = (0, 64), (64, 16), (80, 16)  # first number and count; the indices are int32


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    content = WEIGHTS.copy()
    content[80:] = np.arange(16, dtype=np.int32).view(np.float32)
    content.tofile(folder / "weights.bin")
    write_graph(folder / "prefix.onnx", [external("shared", SHARED), external("indices", INDICES, TensorProto.INT32)])
    write_graph(folder / "flow.onnx", [external("shared", SHARED), external("own", OWN)])
    files = {name: hash_file(folder / name) for name in ("prefix.onnx", "flow.onnx", "weights.bin")}
    write_manifest(manifest_of(files), folder)
    return folder


def external(name, stretch, kind=TensorProto.FLOAT):
    start, count = stretch
    tensor = TensorProto(name=name, dims=[count], data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.bin"), ("offset", 4 * start), ("length", 4 * count)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write_graph(path, tensors):
    inline = numpy_helper.from_array(np.ones(2, np.float32), "gain")
    path.write_bytes(helper.make_model(helper.make_graph([], "g", [], [], [*tensors, inline])).SerializeToString())


def manifest_of(files):
    spec = PolicySpec(2, 56, 4, 12, 8, 0, SamplerSpec(4, 1, "off", 0.0, 1.0, 1))
    graphs = {name: GraphRecord(f"{name}.onnx", 23, 10, {}, {}) for name in ("prefix", "flow")}
    source, proof = CheckpointSource("test", "0" * 64), Proof(1, 0, 1e-5, 0.0, 0.0)
    return Manifest("so101", source, "bf16", spec, 1, 2, graphs, proof, {}, files)


def weights_of(folder):
    return np.fromfile(folder / "weights.bin", np.float32)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(NotABundle):
        redraw_weights(tmp_path, tmp_path / "out", seed=0)


def test_a_changed_bundle_is_refused_and_not_resealed(bundle, tmp_path):
    (bundle / "weights.bin").write_bytes(b"\0" * 384)
    with pytest.raises(DamagedBundle):
        redraw_weights(bundle, tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()


def test_without_the_onnx_package_the_error_names_the_extra(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(NoGraphReader, match=r"onbeat\[export\]"):
        list(external_floats(bundle / "flow.onnx"))


def test_every_array_keeps_its_numbers_and_loses_their_order(bundle, tmp_path):
    redrawn = weights_of(redraw_weights(bundle, tmp_path / "out", seed=0))
    for start, count in (SHARED, OWN):
        before, after = WEIGHTS[start : start + count], redrawn[start : start + count]
        assert (before != after).sum() > 0.8 * count
        np.testing.assert_array_equal(np.sort(before), np.sort(after))


def test_arrays_that_are_no_floats_stay(bundle, tmp_path):
    redrawn = weights_of(redraw_weights(bundle, tmp_path / "out", seed=0))
    np.testing.assert_array_equal(redrawn[80:].view(np.int32), np.arange(16))


def test_the_result_is_a_whole_bundle_and_the_source_is_untouched(bundle, tmp_path):
    before = weights_of(bundle)
    redrawn = load_bundle(redraw_weights(bundle, tmp_path / "out", seed=0))
    assert redrawn.manifest.policy == load_bundle(bundle).manifest.policy
    np.testing.assert_array_equal(weights_of(bundle), before)


def test_a_seed_gives_the_same_weights_and_another_seed_others(bundle, tmp_path):
    first, again, other = (
        weights_of(redraw_weights(bundle, tmp_path / name, seed=seed))[:64]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_graphs_are_copied_as_they_are(bundle, tmp_path):
    out = redraw_weights(bundle, tmp_path / "out", seed=0)
    assert onnx.load(str(out / "flow.onnx"), load_external_data=False).graph.name == "g"
    assert hash_file(out / "flow.onnx") == hash_file(bundle / "flow.onnx")
