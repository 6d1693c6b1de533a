"""`onbeat verify`: what it finds, what it prints, and that exported bundles need neither torch nor the checkpoint."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onbeat.export.verify import NoBundle, find_bundle, main, verify
from onbeat.runtime.cases import load_cases

WITHOUT_WORKSHOP = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from onbeat.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run_without_workshop(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`onbeat ARGUMENTS` in a process where the workshop's packages are not installed."""
    command = [sys.executable, "-c", WITHOUT_WORKSHOP, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_pytorch_reproduces_every_case(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", str(golden), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert [case["embodiment"] for case in report["cases"]] == ["libero"] * 4
    assert all(0 < case["action_pred"] <= 1e-5 for case in report["cases"])


def test_bundles_reproduce_every_case(golden: Path, golden_bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", str(golden), "--backend", "onnx", "--bundles", str(golden_bundles)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].split()[:2] == ["case", "robot"]
    assert all(line.split()[1] == "libero" and line.endswith("yes") for line in lines[1:5])
    assert lines[5] == "4 cases, all within"


def test_bundles_need_no_torch(golden: Path, golden_bundles: Path) -> None:
    done = run_without_workshop("verify", "--cases", golden, "--backend", "onnx", "--bundles", golden_bundles, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]


@pytest.mark.slow
def test_bundles_need_no_checkpoint(golden: Path, golden_bundles: Path, tmp_path: Path) -> None:
    cases = shutil.copytree(golden, tmp_path / "cases", ignore=shutil.ignore_patterns("checkpoint", "unit_*"))
    verdicts = verify(cases, backend="onnx", bundles=golden_bundles)
    assert [verdict.passed for verdict in verdicts] == [True] * 4


@pytest.mark.slow
def test_without_torch_and_bundles_it_says_what_to_run(golden: Path, tmp_path: Path) -> None:
    done = run_without_workshop("verify", "--cases", golden, "--backend", "onnx")
    assert done.returncode == 1
    assert "onbeat export --cases" in done.stderr
    assert "--bundles" in done.stderr
    done = run_without_workshop("verify", "--cases", golden, "--backend", "onnx", "--bundles", tmp_path)
    assert done.returncode == 1
    assert "no bundle" in done.stderr
    done = run_without_workshop("verify", "--cases", golden)
    assert done.returncode == 1
    assert "onbeat[train]" in done.stderr


def test_another_checkpoint_of_the_same_name_is_no_match(golden: Path, golden_bundles: Path, tmp_path: Path) -> None:
    cases = shutil.copytree(golden, tmp_path / "cases", ignore=shutil.ignore_patterns("unit_*"))
    path = cases / "ckpt_a1/checkpoint/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(NoBundle, match="case_01_plain"):
        verify(cases, backend="onnx", bundles=golden_bundles)


def test_each_case_finds_its_own_sampler(golden: Path, golden_bundles: Path) -> None:
    cases = load_cases(golden)
    found = [find_bundle(case, golden, golden_bundles, "fp32") for case in cases]
    assert found[1].name == "ckpt_a2.case_02_mpg1"
    assert found[2].name == "ckpt_a2.case_03_mpg2"
    with pytest.raises(NoBundle):
        find_bundle(cases[0], golden, golden_bundles, "bf16")


@pytest.mark.slow
def test_above_the_tolerance_is_exit_1(golden: Path, golden_bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cases", str(golden), "--backend", "onnx", "--bundles", str(golden_bundles)]
    assert main([*arguments, "--tolerance", "1e-9"]) == 1
    assert "4 cases, 4 above the tolerance" in capsys.readouterr().out
    assert main([*arguments, "--tolerance", "1e-9", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["passed"]


@pytest.mark.parametrize("spoilt", ["actions", "key"])
def test_a_wrong_recording_is_exit_1(golden: Path, golden_bundles: Path, tmp_path: Path, spoilt: str) -> None:
    """The comparison itself: a case whose expectation is moved by 1e-4 must fail."""
    cases = shutil.copytree(golden, tmp_path / "cases", ignore=shutil.ignore_patterns("unit_*"))
    name = {"actions": "out/action_pred", "key": "out/action.gripper_position"}[spoilt]
    path = cases / "ckpt_a1/case_01_plain.npz"
    arrays = dict(np.load(path))
    arrays[name].flat[-1] += 1e-4
    np.savez(path, **arrays)
    verdicts = verify(cases, backend="onnx", bundles=golden_bundles)
    assert [verdict.passed for verdict in verdicts] == [False, True, True, True]


def test_no_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", str(tmp_path)]) == 1
    assert "give a folder of recorded cases" in capsys.readouterr().err
    for manifest in ("[]", "{}"):
        (tmp_path / "manifest.json").write_text(manifest)
        assert main(["--cases", str(tmp_path)]) == 1
        assert "is no list of cases" in capsys.readouterr().err


def test_help_names_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "what answers (default: torch)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [[], ["--cases"], ["--cases", "x", "--backend", "tensorrt"], ["--rope", "fp64"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
