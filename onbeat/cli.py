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
    Command("train", "fit a policy on demonstrations and datasets", "onbeat.training.train:main"),
    Command("export", "compile a checkpoint into a bundle the robot loads", "onbeat.export.export:main"),
    Command("verify", "replay recorded cases and print the largest difference", "onbeat.export.verify:main"),
    Command("view", "look at a flight log in Rerun", "onbeat.runtime.flight.view:main"),
    Command("evaluate", "measure a policy's success in simulated time", "onbeat.runtime.evaluate:main"),
    Command("profile", "where the time goes, and whether two runs differ", "onbeat.runtime.profile.profile:main"),
    Command("replay", "play a flight log again and say which bit is another", "onbeat.runtime.replay.replay:main"),
    Command("soak", "make every fault on the twin, again and again, and judge the wire", "onbeat.runtime.soak:main"),
    Command("bench", "measure the loop, the tick and the seams between chunks", "onbeat.runtime.bench:main"),
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
    return _run(command, arguments[1:])


def usage() -> str:
    """The table of sub-commands."""
    rows = "\n".join(f"  {c.name:<10} {c.summary}" for c in COMMANDS)
    return f"usage: onbeat COMMAND [options]   (onbeat COMMAND --help)\n\n{rows}\n  --version"


def _run(command: Command, arguments: Sequence[str]) -> int:
    """Import the command's area and call it; a user's error becomes its text and exit code 1."""
    module_name, function_name = command.entry.split(":")
    try:
        from onbeat.embodiment.errors import OnbeatError

        entry = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as missing:
        return _report_missing(command.name, missing)
    try:
        return entry(arguments)
    except OnbeatError as error:
        print(f"onbeat {command.name}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as missing:
        return _report_missing(command.name, missing)


EXTRA_OF_PACKAGE = {
    "torch": "train",
    "safetensors": "train",
    "tensorboard": "train",
    "pyarrow": "train",
    "av": "train",
    "onnx": "export",
    "mujoco": "sim",
    "rerun": "view",
    "pyrealsense2": "realsense",
    "tensorrt": "jetson",
    "cuda": "jetson",
}


def _report_missing(command: str, missing: ModuleNotFoundError) -> int:
    """Name the extra that brings the package; a missing module of our own is a defect and is raised."""
    package = (missing.name or "").split(".")[0]
    if package in ("", "onbeat"):
        raise missing
    extra = EXTRA_OF_PACKAGE.get(package)
    remedy = f"pip install 'onbeat[{extra}]'" if extra else f"pip install {package}"
    print(f"onbeat {command}: the package '{package}' is not installed: run `{remedy}`", file=sys.stderr)
    return 1
