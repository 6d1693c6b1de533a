"""The `onbeat` command: help with defaults, wrong usage exits 2, a missing package names its extra."""

import subprocess
import sys

import pytest

from onbeat import cli


def run_onbeat(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "onbeat", *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", [c.name for c in cli.COMMANDS])
def test_every_command_has_help_with_defaults(command: str) -> None:
    result = run_onbeat(command, "--help")
    assert result.returncode == 0, result.stderr
    assert f"onbeat {command}" in result.stdout
    assert "default" in result.stdout
    assert "--json" in result.stdout


def test_no_command_prints_the_table_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "verify" in capsys.readouterr().out


def test_an_unknown_command_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named 'torch' while importing {name}", name="torch")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert cli.main(["train"]) == 1
    assert "pip install 'onbeat[train]'" in capsys.readouterr().err
