"""Fixtures of several areas: the recorded cases, and bundles exported from them once per run."""

import os
from pathlib import Path

import pytest

# Before torch is imported: its threads wait by spinning, which on a shared machine costs more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The soak comes last: it takes minutes, and nothing else should run beside it."""
    items.sort(key=lambda item: item.get_closest_marker("soak") is not None)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded cases."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one exported bundle per recorded case. Read only: copy what you damage."""
    from onbeat.export.export import main

    folder = tmp_path_factory.mktemp("bundles")
    assert main(["--cases", str(GOLDEN), str(folder)]) == 0
    return folder
