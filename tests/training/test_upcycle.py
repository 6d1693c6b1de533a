"""Upcycling: what it adds changes nothing at first, and files with and without it are told apart."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from onbeat.export.verify import verify
from onbeat.runtime.engine import PolicyInputs
from onbeat.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from onbeat.training.config import ConfigError, ExpertsConfig
from onbeat.training.model.policy import count_parameters
from onbeat.training.torch_engine import TorchEngine, build_engine
from onbeat.training.upcycle import UpcycleError, main, upcycle, upcycle_folder

EXPERTS = ExpertsConfig(foundation_layers=1, count=4, top_k=2)
OURS = re.compile(
    r"language_model\.model\.layers\.[12]\."
    r"(experts_mot_gen\.[0-3]\.(gate|up|down)_proj|router_mot_gen(\.token)?)\.weight"
    r"|(proprio_encoder_robot\.layer1|action_encoder\.W1)\.adapter\.weight|action_decoder\.layer2\.adapter\.(weight|bias)"
)


@pytest.fixture
def dense(golden: Path) -> Path:
    return golden / "ckpt_a1/checkpoint"


def random_answer(engine: TorchEngine, seed: int) -> np.ndarray:
    draw, spec = np.random.default_rng(seed), engine.spec
    images = spec.views * spec.tokens_per_view
    inputs = PolicyInputs(
        draw.integers(0, 256, (spec.views, spec.image_size, spec.image_size, 3), np.uint8),
        draw.integers(0, 400, images + 20),
        5,
        images + 8,
        draw.standard_normal(200).astype(np.float32),
    )
    noise = draw.standard_normal((spec.sampler.iterations, spec.chunk, 200)).astype(np.float32)
    return engine.flow(engine.prefix(inputs), noise).actions


@pytest.mark.parametrize(("top_k", "routing"), [(1, "observation"), (3, "observation"), (3, "token")])
def test_an_upcycled_policy_acts_as_the_dense_one(dense: Path, top_k: int, routing: str) -> None:
    policy = load_checkpoint(dense)
    grown = upcycle(policy, replace(EXPERTS, top_k=top_k, routing=routing), adapters=True)
    engines = build_engine(policy, views=1), build_engine(grown, views=1)
    for seed in range(2):
        before, after = (random_answer(engine, seed) for engine in engines)
        assert np.abs(before - after).max() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torch observation", "torch token", "onnx observation"])
def test_upcycled_checkpoints_reproduce_every_recorded_case(golden: Path, tmp_path: Path, how: str) -> None:
    backend, routing = how.split()
    cases = Path(shutil.copytree(golden, tmp_path / "cases", ignore=shutil.ignore_patterns("unit_*", "checkpoint")))
    for name in ("ckpt_a1", "ckpt_a2"):
        experts = replace(EXPERTS, routing=routing)
        upcycle_folder(golden / name / "checkpoint", cases / name / "checkpoint", experts, adapters=True)
    verdicts = verify(cases, backend=backend)
    assert len(verdicts) == 4
    assert all(verdict.passed for verdict in verdicts)


def test_experts_are_weights_of_their_own(dense: Path) -> None:
    policy = load_checkpoint(dense)
    grown = upcycle(policy, EXPERTS)
    addresses = [parameter.data_ptr() for parameter in grown.parameters()]
    assert len(set(addresses)) == len(addresses)
    assert not {parameter.data_ptr() for parameter in policy.parameters()} & set(addresses)
    counts, before = count_parameters(grown), count_parameters(policy)
    assert counts["total"] == before["total"] + counts["experts"] + counts["routers"]


def test_routers_depend_on_the_seed(dense: Path) -> None:
    policy = load_checkpoint(dense)
    name = "language_model.layers.1.gen.router.weight"
    one, same, other = (upcycle(policy, EXPERTS, seed=seed).state_dict()[name] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.any()


def test_names_extend_the_published_ones(dense: Path, tmp_path: Path) -> None:
    upcycle_folder(dense, tmp_path / "out", replace(EXPERTS, routing="token"), adapters=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    added = after.keys() - before.keys()
    assert len(added) == 2 * (4 * 3 + 2) + 4
    assert [name for name in added if not OURS.fullmatch(name)] == []
    files = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}
    assert files == {path.relative_to(dense) for path in dense.rglob("*")}


def test_a_dense_save_has_exactly_the_published_names_and_config(dense: Path, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(dense), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(dense / "model.safetensors").keys()
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written.pop("onbeat")) == {"rope", "mpg_first_pass", "mpg_anchor_bucket"}
    assert written == json.loads((dense / "config.json").read_text())


def test_an_upcycled_checkpoint_is_read_as_it_was_written(dense: Path, tmp_path: Path) -> None:
    written = upcycle_folder(dense, tmp_path / "out", EXPERTS, adapters=True)
    read = load_checkpoint(tmp_path / "out")
    assert read.config == written.config
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), written.parameters(), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.2.experts_mot_gen.3.up_proj.weight",
        "language_model.model.layers.1.router_mot_gen.weight",
        "action_decoder.layer2.adapter.bias",
    ],
)
def test_what_is_missing_of_a_mixture_is_named(dense: Path, tmp_path: Path, name: str) -> None:
    upcycle_folder(dense, tmp_path / "out", EXPERTS, adapters=True)
    tensors = load_file(tmp_path / "out/model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing {re.escape(name)}:"):
        load_checkpoint(tmp_path / "out")


def test_dense_weights_under_a_config_with_experts_are_refused_and_the_reverse(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    upcycle_folder(dense, out, EXPERTS)
    shutil.copy(out / "model.safetensors", tmp_path / "routed.safetensors")
    shutil.copy(dense / "model.safetensors", out)
    with pytest.raises(CheckpointError, match=r"missing language_model\.model.* and 18 more"):
        load_checkpoint(out)
    shutil.copy(tmp_path / "routed.safetensors", out / "model.safetensors")
    shutil.copy(dense / "config.json", out)
    with pytest.raises(CheckpointError, match=r"extra language_model\.model\.layers\.1\.experts_mot_gen"):
        load_checkpoint(out)


def test_what_cannot_be_upcycled_is_refused(dense: Path, tmp_path: Path) -> None:
    policy = load_checkpoint(dense)
    with pytest.raises(UpcycleError, match="experts already"):
        upcycle(upcycle(policy, EXPERTS), EXPERTS)
    with pytest.raises(UpcycleError, match="nothing to add"):
        upcycle(policy, None)
    with pytest.raises(ConfigError, match="foundation_layers is 8: give 1 to 2"):
        upcycle(policy, replace(EXPERTS, foundation_layers=8))
    (tmp_path / "taken").write_text("")
    with pytest.raises(UpcycleError, match="already exists"):
        upcycle_folder(dense, tmp_path, EXPERTS)


def test_adapters_can_be_added_to_a_mixture(dense: Path) -> None:
    mixture = upcycle(load_checkpoint(dense), EXPERTS)
    both = upcycle(mixture, None, adapters=True)
    assert (both.config.adapters, both.config.decoder.experts) == (True, EXPERTS)
    assert all(torch.equal(both.state_dict()[name], tensor) for name, tensor in mixture.state_dict().items())


def test_command_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--experts", "3", "--top-k", "1", "--foundation-layers", "2", "--adapters"]
    assert main([str(dense), str(tmp_path / "out"), *options]) == 0
    assert "M parameters" in capsys.readouterr().out
    config = load_checkpoint(tmp_path / "out").config
    assert (config.decoder.experts, config.adapters) == (ExpertsConfig(2, 3, 1), True)
    assert main([str(dense), str(tmp_path / "out"), *options]) == 1
    assert "already exists" in capsys.readouterr().err
    assert main([str(dense), str(tmp_path / "other")]) == 1
    assert not (tmp_path / "other").exists()
