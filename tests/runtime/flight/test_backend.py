"""Where rounding may be another: what is told of the processor and of the installation."""

from pathlib import Path

import pytest

from onbeat.runtime.flight.backend import backend, backend_changes, instruction_sets


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        ("model name : X\nflags\t\t: fpu sse4_2 avx2 avx fma\n", ["avx", "avx2", "fma"]),
        ("Features\t: fp asimd evtstrm asimddp sve\n", ["asimd", "asimddp", "sve"]),
        ("processor : 0\n", []),
        ("", []),
    ],
)
def test_instruction_sets_of_both_architectures(tmp_path: Path, text: str, sets: list[str]):
    (tmp_path / "cpuinfo").write_text(text)
    assert instruction_sets(tmp_path / "cpuinfo") == sets


def test_a_system_that_does_not_tell_has_none(tmp_path: Path):
    assert instruction_sets(tmp_path / "absent") == []


def test_the_same_machine_has_changed_nothing_and_more_threads_are_a_change():
    one, two = backend(threads=1), backend(threads=2)
    assert backend_changes(one, backend(threads=1)) == []
    assert backend_changes(one, two) == ["threads: 1 -> 2"]


def test_what_an_older_log_does_not_tell_counts_as_a_change():
    assert "numpy" in backend_changes({}, backend(threads=1))[2]
