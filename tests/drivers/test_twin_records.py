"""What the twin writes down: there while it runs, all of it however it ends, and no disk holds it up."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from onbeat.drivers.twin.records import (
    GOAL_RECORD,
    WIRE_FILE,
    Recorder,
    TorqueLine,
    TruthLine,
    read_counts,
    read_goals,
    read_torque,
    read_truth,
)

TRUTH = TruthLine(1, 2, 0.03, False, 4, 5, "lifted")
TORQUE = TorqueLine(7, [True, False], [0.5, -0.5])


def test_all_is_there_once_it_is_closed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "new")
    for k in range(5000):
        recorder.add_goals(k, [k % 4096, -1, 2, 3, 4, 5])
    recorder.add_truth(TRUTH)
    recorder.add_torque(TORQUE)
    recorder.close({"packets": 3})
    goals = read_goals(tmp_path / "new")
    np.testing.assert_array_equal(goals["t_ns"], np.arange(5000))
    assert goals["goal_steps"][4999].tolist() == [903, -1, 2, 3, 4, 5]
    assert list(read_truth(tmp_path / "new")) == [TRUTH]
    assert read_torque(tmp_path / "new") == [TORQUE]
    assert read_counts(tmp_path / "new") == {"packets": 3}


def test_what_an_earlier_run_wrote_is_gone(tmp_path: Path) -> None:
    for _ in range(2):
        recorder = Recorder(tmp_path)
        recorder.add_truth(TRUTH)
        recorder.close({})
    assert list(read_truth(tmp_path)) == [TRUTH]


@pytest.mark.alone
def test_it_can_be_followed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for count in (1, 2, 3):
        recorder.add_goals(count, [0] * 6)
        recorder.add_truth(TRUTH)
        deadline = time.monotonic() + 5
        while len(read_goals(tmp_path)) < count or len(list(read_truth(tmp_path))) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    recorder.close({})


@pytest.mark.alone
def test_a_file_that_takes_nothing_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / WIRE_FILE)
    fifo = os.open(tmp_path / WIRE_FILE, os.O_RDWR | os.O_NONBLOCK)
    room = fcntl.fcntl(fifo, fcntl.F_SETPIPE_SZ, 4096)
    recorder = Recorder(tmp_path)
    count = room // GOAL_RECORD.itemsize + 1000
    adding = threading.Thread(target=lambda: [recorder.add_goals(k, [0] * 6) for k in range(count)], daemon=True)
    adding.start()
    adding.join(10)
    assert not adding.is_alive(), "the file is full, and goals still come"
    closing = threading.Thread(target=recorder.close, args=({},))
    closing.start()
    assert drained(fifo, count * GOAL_RECORD.itemsize)["t_ns"].tolist() == list(range(count))
    closing.join()
    os.close(fifo)


def drained(fd: int, size: int) -> np.ndarray:
    data = b""
    os.set_blocking(fd, True)
    while len(data) < size:
        data += os.read(fd, size)
    return np.frombuffer(data, GOAL_RECORD)


@pytest.mark.alone
def test_a_killed_twin_leaves_all_that_it_said(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib\nfrom onbeat.drivers.twin.records import Recorder\n"
        "recorder = Recorder(pathlib.Path(sys.argv[1]))\n"
        "for k in range(3000): recorder.add_goals(k, [0] * 6)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    deadline = time.monotonic() + 5
    while len(read_goals(tmp_path)) < 3000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
