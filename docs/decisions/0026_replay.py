"""The figures of 0026-replay.md: does the recorded flight notice a changed line, and how far does rounding go?

    python docs/decisions/0026_replay.py mutants     each changed line in a copy of the tree, in plain Python: minutes
    python docs/decisions/0026_replay.py rounding    other optimisations and threads of the same graphs
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime as ort

ROOT = Path(__file__).resolve().parents[2]
FLIGHT = ROOT / "tests" / "golden" / "flight"
BUNDLE = ROOT / "bundles" / "so101-lift"

# File, line as it is, line as it becomes.
MUTANTS = (
    ("kernels/interpolate.py", "start = targets[row, joint]\n", "start = targets[row, joint] + 1e-12\n"),
    ("kernels/interpolate.py", "row * period_ns) / period_ns\n    for", "row * period_ns) / (period_ns + 1)\n    for"),
    ("kernels/splice.py", "weight = (row - first_row + 1) / (rows + 1)\n        for", "weight = 1.0\n        for"),
    ("kernels/limit.py", "        total = 0.0\n", "        total = 1e-12\n"),
    ("runtime/timeline.py", "row < max(next_row + 1, locked_rows)", "row < max(next_row, locked_rows)"),
    ("runtime/timeline.py", "(first_row - 1 if first_row > next_row else", "(first_row if first_row > next_row else"),
    ("runtime/tick.py", "    if level >= HOLD:\n", "    if level > HOLD:\n"),
    ("runtime/tick.py", "state.v_max[j] *= state.safety.thresholds.slow_factor", "state.v_max[j] *= 1.0"),
    ("runtime/safety.py", "if status.quiet > rule.clear_ticks", "if status.quiet >= rule.clear_ticks"),
    ("runtime/safety.py", "status.lasts > rule.then_ticks", "status.lasts >= rule.then_ticks"),
    ("runtime/safety.py", "is_high = math.fabs(load[j]) >", "is_high = load[j] >"),
)

# Fields of a record are attributes in compiled code; in plain Python they are those of a recarray.
PLAIN_RECORDS = {
    "runtime/safety.py": """
_new_safety = new_safety


def new_safety(*arguments, **options):
    made = _new_safety(*arguments, **options)
    return made._replace(rules=made.rules.view(np.recarray), status=made.status.view(np.recarray))
""",
    "runtime/tick.py": """
_new_tick_state = new_tick_state


def new_tick_state(*arguments, **options):
    made = _new_tick_state(*arguments, **options)
    return made._replace(record=made.record.view(np.recarray))
""",
}


def mutants() -> None:
    """A line per mutant: the first field of a tick that differs."""
    copying = _load(ROOT / "tests" / "mutation.py")
    with tempfile.TemporaryDirectory() as folder:
        tree = copying.copy_tree(Path(folder))
        for name, lines in PLAIN_RECORDS.items():
            with (tree / name).open("a", encoding="utf-8") as file:
                file.write(lines)
        print(f"{'as it is':<84} {_first_difference(tree)}")
        for name, line, changed in MUTANTS:
            path = tree / name
            source = path.read_text(encoding="utf-8")
            assert source.count(line) == 1, (name, line)
            path.write_text(source.replace(line, changed), encoding="utf-8")
            print(f"{name:<22} {changed.strip().splitlines()[0]:<61} {_first_difference(tree)}")
            path.write_text(source, encoding="utf-8")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _first_difference(tree: Path) -> str:
    plain = {"PYTHONPATH": str(tree), "ONBEAT_PLAIN": "1", "NUMBA_DISABLE_JIT": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "onbeat", "replay", str(FLIGHT), "--layer", "ticks"]
    told = subprocess.run(command, cwd=tree, env={**os.environ, **plain}, capture_output=True, text=True, check=False)
    lines = told.stdout.splitlines() or told.stderr.splitlines()[-1:]
    return next((line.strip() for line in lines if "first:" in line), lines[-1])


def rounding() -> None:
    """Per build of the same graphs: largest differences from the recorded flight, in noise floors."""
    from onbeat.runtime.policy import load_policy
    from onbeat.runtime.replay.layers import replay_recorded_observations, replay_whole
    from onbeat.runtime.replay.recording import open_recording

    recording = open_recording(FLIGHT)
    _, floors = replay_recorded_observations(recording, load_policy(BUNDLE))
    print("floors", {name: value for name, value in floors.items() if value})
    for threads in (1, 2, 3):
        _tell(f"{threads} threads", replay_whole(recording, load_policy(BUNDLE, threads=threads), floors))
    for name in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"):
        with _optimised(name):
            policy = load_policy(BUNDLE)
        alone, _ = replay_recorded_observations(recording, policy)
        _tell(f"{name}, each chunk by itself", alone)
        _tell(f"{name}, whole", replay_whole(recording, policy, floors))


def _tell(what: str, layer: Any) -> None:
    fields = ", ".join(f"{f.topic} {f.field} {f.largest:.2g} ({f.noise and round(f.noise, 1)})" for f in layer.fields)
    print(f"{what:<44} {fields or 'every bit the same'}")


@contextmanager
def _optimised(name: str) -> Iterator[None]:
    """Sessions that are opened meanwhile get another set of graph optimisations."""
    original = ort.InferenceSession

    def open_session(path: str, options: ort.SessionOptions, **how: Any) -> ort.InferenceSession:
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, name)
        return original(path, options, **how)

    ort.InferenceSession = open_session  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        ort.InferenceSession = original


COMMANDS: dict[str, Callable[[], None]] = {"mutants": mutants, "rounding": rounding}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]]()
