"""The floors hold: an area imports only what is below it, and packaging finds every area."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("embodiment", "kernels", "drivers", "calibration", "runtime", "training", "export")
ROBOT = FLOORS[:5]
# Packages the robot does not carry, and the only places of its half that may name them.
OPTIONAL = {"torch", "onnx", "onnxscript", "safetensors", "tensorrt", "cuda", "pyrealsense2", "mujoco", "rerun"}
MAY_IMPORT_AT_TOP = {"drivers/twin/world.py": {"mujoco"}}


def sources(area: str) -> list[Path]:
    return sorted(p for p in (ROOT / area).rglob("*.py") if "__pycache__" not in p.parts)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every imported module, at any depth, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            base = node.module or ""
            yield node.lineno, base
            if base == "onbeat":
                yield from ((node.lineno, f"onbeat.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("area", FLOORS)
def test_an_area_imports_only_what_is_below_it(area: str) -> None:
    allowed = set(FLOORS[: FLOORS.index(area) + 1])
    for path in sources(area):
        for line, module in imports(ast.parse(path.read_text())):
            parts = module.split(".")
            if parts[0] == "onbeat" and len(parts) > 1:
                assert parts[1] in allowed, f"{path.relative_to(ROOT)}:{line} imports {module}"


@pytest.mark.parametrize("area", ROBOT)
def test_the_robots_half_names_no_optional_package_at_import_time(area: str) -> None:
    for path in sources(area):
        name = str(path.relative_to(ROOT))
        allowed = MAY_IMPORT_AT_TOP.get(name, set())
        for line, module in imports(ast.Module(top_level(ast.parse(path.read_text())), [])):
            package = module.split(".")[0]
            assert package not in OPTIONAL - allowed, f"{name}:{line} imports {package} at import time"


def top_level(tree: ast.Module) -> list[ast.stmt]:
    return [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("area", ROBOT)
def test_torch_is_never_imported_by_the_robots_half(area: str) -> None:
    for path in sources(area):
        for line, module in imports(ast.parse(path.read_text())):
            assert module.split(".")[0] != "torch", f"{path.relative_to(ROOT)}:{line}"


def test_areas_are_namespace_packages_with_a_readme() -> None:
    for area in FLOORS:
        assert not list((ROOT / area).rglob("__init__.py")), f"{area} would shadow other packages"
        assert (ROOT / area / "README.md").is_file(), f"{area} has no README.md"


def test_type_checkers_see_every_area() -> None:
    for area in FLOORS:
        assert (ROOT / "typings" / "onbeat" / area).resolve() == ROOT / area


def test_no_file_has_a_name_that_says_nothing() -> None:
    for area in (*FLOORS, "onbeat"):
        for path in sources(area):
            assert path.stem not in {"utils", "helpers", "common", "misc"}, path
            assert "manager" not in path.stem, path
