"""The recorded flight, and copies of it to change."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from onbeat.runtime.flight.backend import backend, backend_changes
from onbeat.runtime.policy import Policy, load_policy
from onbeat.runtime.replay.layers import replay_whole
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


@pytest.fixture(scope="session")
def native(recording: Recording, policy: Policy) -> Recording:
    """The flight as this machine would have recorded it: where its rounding is another, with its own answers."""
    if not backend_changes(recording.log.header["backend"], backend(threads=1)):
        return recording
    whole = replay_whole(recording, policy, {})
    assert whole.ticks is not None
    assert whole.chunks is not None
    return replace(recording, ticks=whole.ticks, chunks=whole.chunks)


@pytest.fixture
def copy(flight: Path, tmp_path: Path) -> Path:
    """A log folder of one's own."""
    folder = tmp_path / "log"
    folder.mkdir()
    shutil.copy(flight / "000000.mcap", folder)
    return folder
