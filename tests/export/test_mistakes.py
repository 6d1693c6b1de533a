"""Each of these mistakes, made in the real code, makes verify fail: with PyTorch, and through exported graphs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onbeat.export import bundling, flow_graph, layers, proof, verify
from onbeat.kernels import image
from onbeat.runtime import bundle
from onbeat.runtime.language import PolicyLanguage
from onbeat.training import config, config_file, torch_engine
from onbeat.training.model import gating

Patch = Callable[[pytest.MonkeyPatch], None]
Function = Callable[..., Any]


@pytest.fixture
def one_case(golden: Path, tmp_path: Path) -> Path:
    """A folder with the smallest recorded case that has a gate."""
    entry = json.loads((golden / "manifest.json").read_text())[1]
    (tmp_path / "ckpt_a2").symlink_to(golden / "ckpt_a2")
    (tmp_path / "manifest.json").write_text(json.dumps([entry]))
    return tmp_path


def difference(cases: Path, backend: str) -> float:
    """What verify finds; it must not pass."""
    verdict = verify.verify(cases, backend=backend)[0]
    assert not verdict.passed
    return max(verdict.replay.actions, *verdict.replay.keys.values())


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[[Function], Function]) -> None:
    patch.setattr(owner, name, change(getattr(owner, name)))


def drop_zero_state_row(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, gating, "transport_cost", lambda cost: lambda rows, *rest: cost(rows[..., 1:, :], *rest))
    graph_state_row(patch)


def reuse_noise(patch: pytest.MonkeyPatch) -> None:
    def reused(sample: Function) -> Function:
        return lambda policy, cache, spec, noise, **rest: sample(
            policy, cache, spec, noise[:1].expand_as(noise), **rest
        )

    wrap(patch, torch_engine, "sample_chunk", reused)
    graph_noise(patch)


def anchor_at_the_clean_end(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, config_file, "_parse_gate", lambda parse: lambda *a: replace(parse(*a), anchor_bucket=1000))


def expert_epsilon(patch: pytest.MonkeyPatch) -> None:
    def wrong(parse: Function) -> Function:
        def parse_decoder(*arguments: Any) -> config.DecoderConfig:
            decoder = parse(*arguments)
            return replace(decoder, gen=replace(decoder.gen, norm_epsilon=1e-5))

        return parse_decoder

    wrap(patch, config_file, "_parse_decoder", wrong)


def rope_theta(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, config_file, "_parse_decoder", lambda parse: lambda *a: replace(parse(*a), rope_theta=1e4))


def state_slot(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, PolicyLanguage, "unify_state", lambda unify: lambda *a: np.roll(unify(*a), 1))


def action_slot(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, PolicyLanguage, "decode", lambda decode: lambda self, rows: decode(self, np.roll(rows, 1, axis=1)))


def crop(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, image, "crop_start", lambda start: lambda extent, size: start(extent, size) + (extent > size))


MISTAKES = [
    drop_zero_state_row,
    reuse_noise,
    anchor_at_the_clean_end,
    expert_epsilon,
    rope_theta,
    state_slot,
    action_slot,
    crop,
]


@pytest.mark.parametrize("backend", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_verify_fails(mistake: Patch, backend: str, one_case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    assert difference(one_case, backend) > verify.TOLERANCE


def graph_state_row(patch: pytest.MonkeyPatch) -> None:
    drop = flow_graph._without_state_row
    wrap(patch, flow_graph, "_cost", lambda cost: lambda w, rows, *rest: cost(w, drop(w.graph, rows), *rest))


def graph_noise(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, flow_graph, "_noise", lambda noise: lambda writer, value, _: noise(writer, value, 0))


def graph_epsilon(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, layers, "rms_norm", lambda norm: lambda graph, x, weight, epsilon: norm(graph, x, weight, 10 * epsilon))


def graph_rotation(patch: pytest.MonkeyPatch) -> None:
    def shifted(tables: Function) -> Function:
        return lambda graph, positions: tables(graph, graph.op("Add", positions, graph.ints(int(graph.name == "flow"))))

    wrap(patch, layers, "rope_tables", shifted)


def graph_commit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flow_graph, "commit", lambda _, x: x)


def graph_clean_time(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flow_graph, "time_bias", lambda writer, bucket: flow_graph._bucket_weight(writer, bucket))


GRAPH_MISTAKES = [graph_state_row, graph_noise, graph_epsilon, graph_rotation, graph_commit, graph_clean_time]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", GRAPH_MISTAKES)
def test_exporter_refuses_graphs_that_differ(
    mistake: Patch, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onbeat.export.export import case_recipe
    from onbeat.runtime.cases import load_cases

    mistake(monkeypatch)
    recipe = case_recipe(golden, load_cases(golden)[1], rope="fp32")
    with pytest.raises(proof.ProofFailed, match=r"differ .* by \d"):
        bundling.export_bundle(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unsealed_mistake_is_found_by_verify(one_case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the exporter's proof, the recorded case still catches a wrong graph."""
    graph_noise(monkeypatch)
    monkeypatch.setattr(bundling, "prove", lambda *_, **__: bundle.Proof(0, 0, 0.0, 0.0, 0.0))
    assert difference(one_case, "onnx") > verify.TOLERANCE
