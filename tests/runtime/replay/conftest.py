"""The recorded flight, and copies of it to change."""

import shutil
from pathlib import Path

import pytest

from onbeat.runtime.policy import Policy, load_policy
from onbeat.runtime.replay.recording import Recording, open_recording

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def flight(golden: Path) -> Path:
    """The folder of the recorded flight. Read only."""
    return golden / "flight"


@pytest.fixture(scope="session")
def recording(flight: Path) -> Recording:
    return open_recording(flight)


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The one that the flight was recorded with."""
    return ROOT / "bundles" / "so101-lift"


@pytest.fixture(scope="session")
def policy(bundle: Path) -> Policy:
    return load_policy(bundle)


@pytest.fixture
def copy(flight: Path, tmp_path: Path) -> Path:
    """A log folder of one's own."""
    folder = tmp_path / "log"
    folder.mkdir()
    shutil.copy(flight / "000000.mcap", folder)
    return folder
