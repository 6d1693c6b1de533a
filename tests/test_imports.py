"""Every module of the robot's half imports on a machine that has none of the optional packages."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDS_MUJOCO = {"onbeat.drivers.twin.world", "onbeat.drivers.twin.reach"}

PROGRAM = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f'{{name}} is blocked', name=name)

sys.meta_path.insert(0, Blocked())
for module in {modules!r}:
    importlib.import_module(module)
    print(module)
"""
OPTIONAL = ("torch", "onnx", "onnxscript", "safetensors", "tensorrt", "cuda", "pyrealsense2", "mujoco", "rerun", "tqdm")


def module_names(areas: tuple[str, ...]) -> list[str]:
    names = []
    for area in areas:
        for path in sorted((ROOT / area).rglob("*.py")):
            if path.stem != "__main__" and "__pycache__" not in path.parts:
                names.append(".".join(("onbeat", *path.relative_to(ROOT).with_suffix("").parts)))
    return names


def import_with_blocked(modules: list[str]) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(blocked=OPTIONAL, modules=modules)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_the_robots_half_imports_without_optional_packages() -> None:
    names = module_names(("embodiment", "kernels", "drivers", "calibration", "runtime"))
    wanted = [n for n in names if n not in NEEDS_MUJOCO]
    result = import_with_blocked(wanted)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == wanted


def test_the_block_really_blocks() -> None:
    result = import_with_blocked(["onbeat.drivers.twin.world"])
    assert result.returncode != 0
    assert "blocked" in result.stderr


def test_the_front_door_imports_an_area_only_when_its_command_runs() -> None:
    program = "import sys, onbeat.cli; onbeat.cli.main(['--help']); print([m for m in sys.modules if 'onbeat.' in m])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "['onbeat.cli']", result.stderr
