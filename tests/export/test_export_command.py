"""`onbeat export`: what it writes, that it writes all or nothing, and what it refuses."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest

from onbeat.embodiment.errors import OnbeatError
from onbeat.export import bundling
from onbeat.export.digest import digest_checkpoint
from onbeat.export.export import main
from onbeat.export.graph import OPSET
from onbeat.runtime.bundle import load_bundle
from onbeat.runtime.policy import load_policy

DOMAINS = {""}  # ONNX's own operators only: TensorRT and ONNX Runtime take them alike


@pytest.fixture
def checkpoint(golden: Path, tmp_path: Path) -> Path:
    """A checkpoint folder that a test may damage."""
    return Path(shutil.copytree(golden / "ckpt_a2/checkpoint", tmp_path / "checkpoint"))


def export(checkpoint: Path, out: Path, *options: str) -> int:
    return main([str(checkpoint), str(out), "--embodiment", "libero", *options])


def test_defaults(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(checkpoint, tmp_path / "out", "--json") == 0
    row = json.loads(capsys.readouterr().out)[0]
    manifest = load_bundle(tmp_path / "out").manifest
    assert (row["gate"], row["iterations"], row["rope"]) == ("expectation", 2, "bf16")
    assert (manifest.policy.sampler.gate, manifest.rope) == ("expectation", "bf16")
    assert manifest.checkpoint.sha256 == digest_checkpoint(checkpoint)
    assert 0 < manifest.proof.prefix == row["prefix_difference"] <= 1e-5
    assert 0 < manifest.proof.flow == row["flow_difference"] <= 1e-5
    assert set(manifest.made_with) == {"onbeat", "torch", "onnx", "onnxruntime"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_options(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--steps", "2", "--refinements", "3", "--gate", "directions", "--rope", "fp32"]
    assert export(checkpoint, tmp_path / "out", *options) == 0
    manifest = load_bundle(tmp_path / "out").manifest
    sampler = manifest.policy.sampler
    assert (sampler.flow_steps, sampler.iterations, sampler.gate, manifest.rope) == (2, 4, "directions", "fp32")
    assert manifest.graphs["flow"].inputs["directions"] == ["float32", [3, 2, 16, 64]]


@pytest.mark.slow
def test_gate_off(checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, tmp_path / "out", "--gate", "off") == 0
    manifest = load_bundle(tmp_path / "out").manifest
    assert manifest.policy.sampler.iterations == 1
    assert set(manifest.graphs["flow"].outputs) == {"actions"}


def test_graphs_are_of_an_old_enough_opset(golden_bundles: Path) -> None:
    for path in golden_bundles.glob("*/*.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": OPSET}
        assert {node.domain for node in model.graph.node} == DOMAINS
        assert model.ir_version <= 10
    assert OPSET <= 23


def test_what_control_never_needs_is_left_out(golden_bundles: Path) -> None:
    model = onnx.load(golden_bundles / "ckpt_a1.case_01_plain/prefix.onnx", load_external_data=False)
    names = {tensor.name for tensor in model.graph.initializer}
    last = "language_model.model.layers.2."
    assert any(name.startswith(last + "self_attn.kv_proj") for name in names)
    unneeded = ("lm_head", "model.norm", last + "mlp", last + "self_attn.q", last + "self_attn.o", "action_", "mpg")
    assert [name for name in names if any(part in name for part in unneeded)] == []


@pytest.mark.slow
def test_steps_share_their_weights(checkpoint: Path, tmp_path: Path) -> None:
    sizes = []
    for steps in ("1", "8"):
        assert export(checkpoint, tmp_path / steps, "--steps", steps) == 0
        sizes.append((tmp_path / steps / "weights.bin").stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_same_checkpoint_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert export(checkpoint, tmp_path / name) == 0
    assert load_bundle(tmp_path / "one").manifest.files == load_bundle(tmp_path / "two").manifest.files


def test_bundle_runs_with_the_checkpoint_gone(checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, tmp_path / "out") == 0
    shutil.rmtree(checkpoint)
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert load_policy(moved, embodiment="libero").spec.chunk == 16


def test_existing_output(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert export(checkpoint, out) == 0  # an empty folder is no obstacle
    first = load_bundle(out).manifest
    assert export(checkpoint, out, "--steps", "2") == 1
    assert "already exists" in capsys.readouterr().err
    assert load_bundle(out).manifest == first
    assert export(checkpoint, out, "--steps", "2", "--replace") == 0
    assert load_bundle(out).manifest.policy.sampler.flow_steps == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


@pytest.mark.slow
def test_failure_leaves_the_old_bundle(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert export(checkpoint, out) == 0
    first = load_bundle(out).manifest

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundling, "prove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, out, "--replace")
    assert load_bundle(out).manifest == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_proof_that_fails_gives_its_figures(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint, tmp_path / "out", "--tolerance", "1e-12") == 1
    assert "e-07" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tokenizer_of_another_checkpoint(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["added_tokens"].append({**document["added_tokens"][-1], "id": 600, "content": "<|beyond|>"})
    document["model"]["vocab"]["<|beyond|>"] = 600
    path.write_text(json.dumps(document), encoding="utf-8")
    assert export(checkpoint, tmp_path / "out") == 1
    assert "token 600" in capsys.readouterr().err


def damage(checkpoint: Path, name: str) -> None:
    if name == "truncated weights":
        path = checkpoint / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif name == "no weights":
        (checkpoint / "model.safetensors").unlink()
    elif name == "unknown template":
        path = checkpoint / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "template": "llama"}))
    elif name == "no tokens":
        path = checkpoint / "tokenizer.json"
        path.write_text(path.read_text(encoding="utf-8").replace("<|state_start|>", "<|stat_start|>"), encoding="utf-8")
    else:
        shutil.rmtree(checkpoint)


@pytest.mark.parametrize("name", ["truncated weights", "no weights", "unknown template", "no tokens", "no folder"])
def test_bad_checkpoint(checkpoint: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage(checkpoint, name)
    assert export(checkpoint, tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith("onbeat export: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--steps", "0"), ("--refinements", "-1")])
def test_too_few_are_refused(
    checkpoint: Path, tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint, tmp_path / "out", option, value) == 1
    assert f"is {value}: give at least" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_digest_follows_every_file_that_matters(checkpoint: Path) -> None:
    first = digest_checkpoint(checkpoint)
    (checkpoint / "README.md").write_text("notes")
    assert digest_checkpoint(checkpoint) == first
    for name in ("config.json", "tokenizer.json", "experiment_cfg/libero_posttrain_metadata.json"):
        (checkpoint / name).write_text((checkpoint / name).read_text(encoding="utf-8") + " ", encoding="utf-8")
        assert digest_checkpoint(checkpoint) != first
        first = digest_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["ckpt"],
        ["ckpt", "out"],
        ["c", "out", "--cases", "x"],
        ["ckpt", "out", "--embodiment", "x", "--gate", "y"],
    ],
)
def test_wrong_usage(arguments: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_help_names_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "gate's cost is taken (default: expectation)" in " ".join(capsys.readouterr().out.split())


def test_unknown_robot(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), str(tmp_path / "out"), "--embodiment", "liberoo"]) == 1
    assert "libero" in capsys.readouterr().err
    assert issubclass(bundling.WrongTokenizer, OnbeatError)
