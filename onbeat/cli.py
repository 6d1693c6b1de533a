"""The front door: one command, `onbeat`, whose sub-commands live in the areas that do the work."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from onbeat import __version__


class Command(NamedTuple):
    """A sub-command: its name, one line of help, and `module:function`, imported only when it runs."""

    name: str
    summary: str
    entry: str


COMMANDS = (
    Command("run", "drive a robot (or the simulated twin) with a policy bundle", "onbeat.runtime.run:main"),
    Command("train", "fit a policy on recorded demonstrations", "onbeat.training.train:main"),
    Command("export", "compile a checkpoint into a bundle the robot loads", "onbeat.export.export:main"),
    Command("verify", "replay recorded cases and print the largest difference", "onbeat.export.verify:main"),
    Command("evaluate", "measure a policy's success in simulated time", "onbeat.runtime.evaluate:main"),
    Command("doctor", "check this machine: packages, libraries, ports, permissions", "onbeat.runtime.doctor:main"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns its exit code (0 done, 1 failed, 2 wrong usage)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"onbeat {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    command = next((c for c in COMMANDS if c.name == arguments[0]), None)
    if command is None:
        print(f"onbeat: unknown command '{arguments[0]}'\n{usage()}", file=sys.stderr)
        return 2
    return _entry(command)(arguments[1:])


def usage() -> str:
    """The table of sub-commands."""
    rows = "\n".join(f"  {c.name:<10} {c.summary}" for c in COMMANDS)
    return f"usage: onbeat COMMAND [options]   (onbeat COMMAND --help)\n\n{rows}\n  --version"


def _entry(command: Command):
    module_name, function_name = command.entry.split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("onbeat"):
            raise
        return lambda _: _report_missing(command.name, missing.name)
    return getattr(module, function_name)


EXTRA_OF_PACKAGE = {
    "torch": "train",
    "safetensors": "train",
    "onnx": "export",
    "onnxscript": "export",
    "mujoco": "sim",
    "pyrealsense2": "realsense",
    "tensorrt": "jetson",
    "cuda": "jetson",
}


def _report_missing(command: str, package: str | None) -> int:
    extra = EXTRA_OF_PACKAGE.get(package or "")
    remedy = f"pip install 'onbeat[{extra}]'" if extra else f"pip install {package}"
    print(f"onbeat {command}: the package '{package}' is not installed: run `{remedy}`", file=sys.stderr)
    return 1
