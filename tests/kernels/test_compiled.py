"""What is kept on disk counts only while everything it was made from is as it was."""

from pathlib import Path

import numpy as np
import pytest
from numba.core.errors import NumbaError

from onbeat.kernels.compiled import STAMP, compiled, compiled_sources, stamp_sources

LOOP = "from onbeat.runtime.tick import tick\n\n@compiled\ndef loop(): ...\n"
TICK = "from onbeat.kernels.limit import limit\n"
FILES = {"runtime/loop.py": LOOP, "runtime/tick.py": TICK, "kernels/limit.py": "MOST = 1\n", "runtime/page.py": "1\n"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", ["runtime/loop.py", "runtime/tick.py", "kernels/limit.py"])
def test_a_change_of_what_a_function_calls_changes_the_stamp(tree: Path, name: str):
    before = stamp_sources([tree])
    (tree / name).write_text(FILES[name] + "# more\n")
    assert stamp_sources([tree]) != before


def test_a_change_of_anything_else_does_not(tree: Path):
    before = stamp_sources([tree])
    (tree / "runtime/page.py").write_text("2\n")
    (tree / "tests").mkdir()
    (tree / "tests/loop.py").write_text(LOOP)
    assert stamp_sources([tree]) == before


def test_a_place_without_sources_has_no_stamp(tmp_path: Path):
    assert stamp_sources([tmp_path]) == ""


def test_an_edit_of_a_session_or_a_command_compiles_nothing_anew():
    modules = compiled_sources([Path(__file__).parents[2]]).keys()
    assert {"runtime.loop", "runtime.tick", "runtime.safety", "kernels.limit"} <= modules
    assert not modules & {"runtime.daemon", "runtime.run", "runtime.scheduler", "runtime.robots", "runtime.bench_loop"}


def test_what_is_compiled_is_kept_under_the_stamp():
    @compiled
    def one() -> int:
        return 1

    assert one() == 1
    assert one._cache._cache_file._source_stamp == STAMP
    assert len(STAMP) == 64


def test_code_that_would_allocate_is_refused_by_the_compiler():
    @compiled
    def larger(values: np.ndarray) -> bool:
        return (values + 1.0).sum() > 0.0

    with pytest.raises(NumbaError, match="NRT required"):
        larger(np.zeros(3))
