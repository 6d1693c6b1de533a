"""Would the tests notice? Every comparison, operator and number of the files that shape commands, changed one by one.

    python tests/mutation.py            all files, prints the mutants that no test noticed; exit code 1 if there are any
    python tests/mutation.py splice     one file

Each mutant is a copy of the tree with one change. It first meets the tests that can kill it in plain Python, in a fork
that has imported everything else; one that they let pass meets the compiled tests of what is behind it. By hand, not in
CI.
"""

import argparse
import ast
import copy
import importlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    *("embodiment", "kernels", "drivers", "calibration", "runtime", "training", "export"),
    *("onbeat", "tests", "pyproject.toml", "setup.py"),
)
TESTS = {
    "kernels/limit.py": ("tests/kernels/test_limit.py",),
    "kernels/splice.py": ("tests/kernels/test_splice.py",),
    "kernels/interpolate.py": ("tests/kernels/test_interpolate.py",),
    "runtime/timeline.py": (
        "tests/runtime/test_timeline.py",
        "--deselect",
        "tests/runtime/test_timeline.py::TestThreads",
    ),
}
_TICK = ("tests/runtime/test_tick.py", "tests/runtime/test_tick_safety.py", "tests/runtime/test_chunk_schedules.py")
BEHIND = {
    "kernels/limit.py": ("tests/kernels", *_TICK),
    "kernels/splice.py": ("tests/kernels/test_splice.py", "tests/runtime/test_timeline.py", *_TICK),
    "kernels/interpolate.py": ("tests/kernels/test_interpolate.py", "tests/runtime/test_timeline.py", *_TICK),
    "runtime/timeline.py": ("tests/runtime/test_timeline.py", *_TICK, "tests/runtime/test_scheduler.py"),
}
IMPORTED = ("numpy", "numba", "hypothesis.strategies", "hypothesis.extra.numpy", "_hypothesis_pytestplugin")
PLAIN = {"NUMBA_DISABLE_JIT": "1", "ONBEAT_PLAIN": "1"}
SETTINGS = "_hypothesis_internal_use_settings"
FEW_EXAMPLES = 20
PLAIN_LIMIT_S, COMPILED_LIMIT_S = 20, 1800  # a mutant that never ends is noticed as well

# What changes nothing that could be seen: the line as it was and as it became -> why.
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "while dt * h * (whole_steps + 1) * (whole_steps + 2) / 2 <= gap:",
        "while dt * h * (whole_steps + 1) * (whole_steps + 2) / 2 < gap:",
    ): "at equality both counts of steps give the same speed",
    **{
        (
            "return (BEFORE_FIRST_ROW if row < 0 else length, 0.0)",
            f"return (BEFORE_FIRST_ROW if row {now} else length, 0.0)",
        ): "row 0 is before the end of every chunk, so it never comes here"
        for now in ("<= 0", "< 1")
    },
    ("oldest = newest = 0", "oldest = newest = 1"): "where the search begins",
    ("NEVER = -2 ** 62", "NEVER = -2 ** 63"): "both are before every time there is",
    ("store_release(timeline.closed, 0, 1)", "store_release(timeline.closed, 0, 2)"): "anything but 0 is closed",
    **{
        (
            f"if timeline.chunk_id[slot] {was} timeline.chunk_id[{end}]:",
            f"if timeline.chunk_id[slot] {was}= timeline.chunk_id[{end}]:",
        ): "only empty slots have the same id"
        for was, end in (("<", "oldest"), (">", "newest"))
    },
    (
        "if oldest == EMPTY or timeline.chunk_id[slot] < timeline.chunk_id[oldest]:",
        "if oldest == EMPTY or timeline.chunk_id[slot] <= timeline.chunk_id[oldest]:",
    ): "only empty slots have the same id",
    ("SLOTS = 16", "SLOTS = 17"): "a size that was chosen, and no rule",
    ("LOOKS = 8", "LOOKS = 9"): "a size that was chosen, and no rule",
    ("if gap <= 0.0:", "if gap < 0.0:"): "the formula gives 0 for a gap of 0 too",
}

SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
NAMES = {"min": "max", "max": "min"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A file with one change. line: of the source, from 1."""

    path: str
    line: int
    was: str
    now: str
    source: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.was.strip()}  ->  {self.now.strip()}"


def mutants(path: str) -> Iterator[Mutant]:
    """Every mutant of a file."""
    source = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(source)
    plain = ast.unparse(tree).splitlines()
    for index, node in enumerate(ast.walk(tree)):
        for change in range(len(_changes(node))):
            changed = copy.deepcopy(tree)
            target = next(n for k, n in enumerate(ast.walk(changed)) if k == index)
            _changes(target)[change]()
            text = ast.unparse(changed)
            lines = [(a, b) for a, b in zip(plain, text.splitlines(), strict=False) if a != b]
            if lines:
                yield Mutant(path, getattr(node, "lineno", 0), *lines[0], text)


def _changes(node: ast.AST) -> list:
    """What can be done to a node, as functions that do it."""
    if isinstance(node, ast.Compare):
        return [lambda new=new: node.ops.__setitem__(0, new()) for new in SWAPS.get(type(node.ops[0]), ())]
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        return [lambda new=new: setattr(node, "op", new()) for new in SWAPS.get(type(node.op), ())]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return [lambda: setattr(node, "value", node.value + 1)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        return [lambda: setattr(node.func, "id", NAMES[node.func.id])]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return [lambda: setattr(node, "op", ast.UAdd())]
    return []


def is_noticed(mutant: Mutant, tree: Path, *, plain_only: bool) -> bool:
    """Whether some test fails in `tree`, a copy that is the mutant's for as long as this takes."""
    place = tree / mutant.path
    place.write_text(mutant.source, encoding="utf-8")
    try:
        if not all(passes_plain(tree, TESTS[mutant.path], examples) for examples in (FEW_EXAMPLES, None)):
            return True
        return not plain_only and not passes_compiled(tree, BEHIND[mutant.path])
    finally:
        shutil.copyfile(ROOT / mutant.path, place)


def passes_plain(tree: Path, tests: Sequence[str], examples: int | None = None) -> bool:
    """Tests in plain Python, in a fork of this process, which has imported everything but what is tested.

    examples: of each property at most; None for all.
    """
    child = os.fork()
    if child == 0:
        run_and_exit(tree, tests, examples)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def run_and_exit(tree: Path, tests: Sequence[str], examples: int | None) -> NoReturn:
    """The tests of a fork. Same examples each time, and no search for the smallest one that fails."""
    resource.setrlimit(resource.RLIMIT_CPU, (PLAIN_LIMIT_S, PLAIN_LIMIT_S))  # of processor: a busy machine kills none
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    quick = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutation", phases=quick, derandomize=True, database=None)
    hypothesis.settings.load_profile("mutation")
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[PropertiesLast(examples)])))


class PropertiesLast:
    """Has pytest run the short tests first, and properties with a few examples only where that is asked."""

    def __init__(self, examples: int | None) -> None:
        self.examples = examples

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: hasattr(item.obj, "hypothesis"))
        for function in (getattr(item.obj, "__func__", item.obj) for item in items):
            own = getattr(function, SETTINGS, None)
            if own is not None and self.examples is not None:
                setattr(function, SETTINGS, hypothesis.settings(own, max_examples=min(self.examples, own.max_examples)))


def passes_compiled(tree: Path, tests: Sequence[str]) -> bool:
    """Tests as they always run, in a process of their own: everything is compiled anew."""
    environment = {key: value for key, value in os.environ.items() if key not in PLAIN}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env={**environment, "PYTHONPATH": str(tree)},
            capture_output=True,
            timeout=COMPILED_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def copy_tree(into: Path) -> Path:
    """A tree of our own; atomics are plain loads and stores where nothing is compiled."""
    for name in COPIED:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "golden", ".hypothesis")
        (shutil.copytree(source, into / name, ignore=ignored) if source.is_dir() else shutil.copy(source, into / name))
    with (into / "kernels" / "atomics.py").open("a", encoding="utf-8") as file:
        file.write(PLAIN_ATOMICS)
    return into


PLAIN_ATOMICS = """
import os as _os

if _os.environ.get("ONBEAT_PLAIN"):
    _load_acquire = lambda words, index: int(words[index])
    _store_release = lambda words, index, value: words.__setitem__(index, value)
    _fence = lambda: None
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run every mutant; 0 when each was noticed or is known to change nothing."""
    parser = argparse.ArgumentParser(description="Mutation run over what shapes commands.")
    parser.add_argument("files", nargs="*", help="names such as `splice`; none: all")
    parser.add_argument("--plain-only", action="store_true", help="only the file's own tests, in plain Python: minutes")
    options = parser.parse_args(argv)
    os.environ.update(PLAIN, OMP_NUM_THREADS="1")
    for name in IMPORTED:
        importlib.import_module(name)
    names = options.files
    paths = [path for path in TESTS if not names or Path(path).stem in names]
    survivors: list[Mutant] = []
    total, begun_s = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        tree = copy_tree(Path(scratch))
        for path in paths:
            if not all(passes_plain(tree, TESTS[path], examples) for examples in (FEW_EXAMPLES, None)):
                print(f"{path}: its tests fail without any change: mend them first", file=sys.stderr)
                return 2
            for mutant in mutants(path):
                total += 1
                if is_noticed(mutant, tree, plain_only=options.plain_only):
                    continue
                reason = EQUIVALENT.get((mutant.was.strip(), mutant.now.strip()))
                survivors += [] if reason else [mutant]
                print(f"{'equivalent' if reason else 'SURVIVED'}  {mutant}  {reason or ''}", flush=True)
            print(f"{path}: {total} mutants so far, {time.monotonic() - begun_s:.0f} s", flush=True)
    print(f"{total} mutants, {len(survivors)} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
