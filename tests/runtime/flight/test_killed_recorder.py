"""A process that is killed while it records loses less than a second, and nothing of what came before."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from onbeat.runtime.flight.reader import read_log

pytestmark = pytest.mark.alone

PROGRAM = Path(__file__).parent / "recording_process.py"
ROOT = PROGRAM.parents[3]
SECOND_NS = 1_000_000_000
SEED = random.randrange(10**6)


class Recording:
    """One such process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "log"
        np.zeros(2, np.int64).tofile(folder / "words")
        self.words = np.memmap(folder / "words", np.int64, "r")
        program = f"import runpy; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
        command = [sys.executable, "-c", program, str(self.folder), str(folder / "words")]
        self.process = subprocess.Popen(command, cwd=ROOT)

    def wait(self) -> None:
        """Until it records."""
        deadline = time.monotonic() + 60
        while not self.words[0]:
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill(self) -> tuple[int, int]:
        """Returns when the first tick was put, and the last before it died."""
        self.process.kill()
        self.process.wait()
        first_ns, last_ns = self.words.tolist()
        return first_ns, last_ns


@pytest.mark.slow
def test_kills_cost_less_than_a_second_and_nothing_before(tmp_path: Path):
    """Three at a time, each killed at some moment of its own."""
    rng, recordings = random.Random(SEED), list[Recording]()
    put_ns: list[tuple[int, int]] = []
    try:
        for k in range(3):
            (tmp_path / str(k)).mkdir()
            recordings.append(Recording(tmp_path / str(k)))
        for recording in recordings:
            recording.wait()
            time.sleep(rng.uniform(0.2, 1.2))
    finally:
        put_ns += [recording.kill() for recording in recordings]
    for recording, (first_ns, last_ns) in zip(recordings, put_ns, strict=True):
        check_what_is_left(recording.folder, first_ns, last_ns)


def check_what_is_left(folder: Path, first_ns: int, last_ns: int) -> None:
    """Of a log whose process put its first tick and its last then."""
    log = read_log(folder)
    ticks, chunks, seen = (log.records(topic) for topic in ("/tick", "/chunk", "/observation"))
    times_ns = np.concatenate([[first_ns], ticks["due_ns"]])
    starved_ns = int(np.diff(times_ns[-500:]).max(initial=0))  # on a busy machine: no thread of it ran
    assert last_ns - times_ns[-1] < SECOND_NS + starved_ns, f"seed {SEED}"
    assert (np.diff(ticks["number"]) == 1).all(), "no tick in between is lost"
    assert (ticks["goal_rad"] == ticks["number"][:, None]).all()
    assert (np.diff(chunks["number"]) == 1).all()
    frames = {view: dict(log.frames(view)) for view in log.cameras}
    for number, observed_ns in zip(chunks["number"], seen["t_ns"], strict=False):
        assert all((frames[view][observed_ns] == number % 256).all() for view in log.cameras)
    assert log.outcome is None
    assert "cut off after" in log.problems[-2]
