"""The whole twin in its own processes: bus, cameras, truth, and how it ends."""

import gc
import itertools
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("mujoco")
from onbeat.drivers.feetech import errors
from onbeat.drivers.feetech.device import BusSettings, FeetechBus
from onbeat.drivers.feetech.packets import encode_packet, reference_goals, reference_request
from onbeat.drivers.feetech.tables import Instruction
from onbeat.drivers.twin import serve
from onbeat.drivers.twin.client import RunningTwin, TwinFailed, start_twin
from onbeat.drivers.twin.frames import SHARED_MEMORY
from onbeat.drivers.twin.records import read_counts, read_goals, read_truth
from onbeat.drivers.twin.serve import Twin, TwinSettings
from onbeat.drivers.twin.world import World

pytestmark = pytest.mark.alone

PATIENT = BusSettings(timeout_ms=2000.0)  # a busy machine must not make it ask, and write goals, twice


def wait_until(condition, timeout_s: float = 8.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def shared_memory_of(pid: int) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"onbeat-{pid}-*"))


def test_the_arm_moves_and_the_truth_is_written(tmp_path: Path, joints, state) -> None:
    twins = start_twin(tmp_path, has_cameras=False, attempt_timeout_s=0.4)
    with twins as twin, FeetechBus(twin.port, joints, PATIENT) as bus:
        bus.enable(True)
        bus.read(state)
        goal = state.position_rad + 0.15
        for _ in range(60):
            bus.exchange(goal, state)
            time.sleep(0.01)
        np.testing.assert_allclose(state.position_rad, goal, atol=0.03)
    events = [line.event for line in read_truth(tmp_path) if line.event]
    assert events[:3] == ["attempt_started", "timed_out", "attempt_started"]
    goals = read_goals(tmp_path)
    assert len(goals) == 61, "one from enable, which holds, and sixty"
    assert (np.diff(goals["t_ns"]) > 0).all()
    np.testing.assert_array_equal(goals["goal_steps"][-1], np.rint(2048 + goal * 4096 / (2 * np.pi)))
    counts = read_counts(tmp_path)
    assert counts["goal_writes"] == 61
    assert counts["bad_checksums"] == 0
    assert counts["failed"] >= 1


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Twin]:
    """A twin in this process, as ordinary as this process is."""
    monkeypatch.setattr(serve, "claim_realtime", lambda _priority: False)
    with closing(Twin(World(0), TwinSettings(0, tmp_path, has_cameras=False, is_paced=False))) as twin:
        yield twin


def test_a_request_is_answered_before_the_world_has_finished_its_step(here: Twin) -> None:
    fd = os.open(here.port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    stop, step, answered = threading.Event(), here.world.step, []

    def ask_and_step(duration_ns: int) -> None:
        answered.append(bool(select.select([fd], [], [], 0)[0]))
        os.write(fd, encode_packet(1, Instruction.PING))
        step(duration_ns)
        stop.set()

    here.world.step = ask_and_step
    here.run(stop)
    os.close(fd)
    assert answered == [False, True], "two steps of 2 ms"


def test_serving_and_stepping_leave_no_garbage(here: Twin) -> None:
    fd = os.open(here.port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    stop, step, steps = threading.Event(), here.world.step, itertools.count()

    def ask_and_step(duration_ns: int) -> None:
        os.write(fd, reference_goals(list(range(1, 7)), [2048] * 6) + reference_request(list(range(1, 7))))
        step(duration_ns)
        if next(steps) == 100:
            stop.set()

    here.world.step = ask_and_step
    gc.collect()
    gc.disable()
    try:
        here.run(stop)
        assert gc.collect() == 0
    finally:
        gc.enable()
        os.close(fd)


@pytest.mark.slow
def test_physics_keeps_real_time(tmp_path: Path, joints, state) -> None:
    with start_twin(tmp_path, has_cameras=False) as twin, FeetechBus(twin.port, joints) as bus:
        bus.read(state)
        bus.write_register("shoulder_pan", "goal_velocity", 300)
        far_goal = state.position_rad + np.array([0.9, 0, 0, 0, 0, 0])
        bus.exchange(far_goal, state)
        start_rad, start_ns = state.position_rad[0], state.t_ns
        time.sleep(1.0)
        bus.read(state)
    speed = (state.position_rad[0] - start_rad) / (state.t_ns - start_ns) * 1e9
    assert speed == pytest.approx(300 * 2 * np.pi / 4096, rel=0.12)


@pytest.mark.slow
def test_cameras_show_a_world_that_moves(tmp_path: Path, joints, state) -> None:
    with start_twin(tmp_path, frame_size=64) as twin, FeetechBus(twin.port, joints) as bus:
        cameras = twin.open_cameras()
        assert [camera.name for camera in cameras] == ["top", "wrist"]
        first = [camera.latest() for camera in cameras]
        assert all(frame is not None and frame.rgb.shape == (64, 64, 3) for frame in first)
        assert all(frame is not None and frame.rgb.std() > 5 for frame in first)
        bus.read(state)
        bus.write(state.position_rad + np.array([0.5, 0, 0, 0, 0, 0]))
        time.sleep(1.5)
        now_ns = time.monotonic_ns()
        last = [camera.latest() for camera in cameras]
    for before, after in zip(first, last, strict=True):
        assert before is not None
        assert after is not None
        assert after.sequence >= before.sequence + 5
        assert 0 < now_ns - after.t_capture_ns < 1_000_000_000
        assert np.abs(after.rgb.astype(int) - before.rgb).mean() > 1
    assert shared_memory_of(twin.pid) == []


@pytest.mark.slow
def test_the_same_seed_starts_the_same_world(tmp_path: Path, joints, state) -> None:
    seen = []
    for seed in (3, 3, 4):
        with start_twin(tmp_path, seed=seed, has_cameras=False) as twin, FeetechBus(twin.port, joints) as bus:
            bus.read(state)
            seen.append(state.position_rad.copy())
    np.testing.assert_allclose(seen[0], seen[1], atol=0.004)
    assert np.abs(seen[0] - seen[2]).max() > 0.01


@pytest.mark.slow
def test_a_killed_twin_is_a_lost_port_and_leaves_nothing(tmp_path: Path, joints, state) -> None:
    with start_twin(tmp_path, frame_size=32) as twin, FeetechBus(twin.port, joints) as bus:
        children = psutil.Process(twin.pid).children()
        os.kill(twin.pid, signal.SIGKILL)
        assert wait_until(lambda: not any(child.is_running() for child in children))
        with pytest.raises(errors.PortLost):
            bus.read(state)
    assert shared_memory_of(twin.pid) == []


@pytest.mark.slow
def test_a_client_that_dies_takes_the_twin_along(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib\nfrom onbeat.drivers.twin.client import start_twin\n"
        "with start_twin(pathlib.Path(sys.argv[1]), frame_size=32) as twin:\n"
        "    print(twin.pid, flush=True)\n    os._exit(1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    pid = int(ended.stdout)
    assert wait_until(lambda: shared_memory_of(pid) == [])
    assert wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


@pytest.mark.slow
def test_no_way_to_draw_is_told_with_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "OpenGL").mkdir()
    (tmp_path / "OpenGL" / "__init__.py").write_text("raise ImportError('no OpenGL library')\n")
    with pytest.raises(TwinFailed, match=r"apt-get install .*libegl1 libgl1-mesa-dri"), start_twin(tmp_path):
        pass


def test_a_missing_simulator_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "mujoco.py").write_text("raise ModuleNotFoundError('No module named mujoco', name='mujoco')\n")
    with pytest.raises(TwinFailed, match=r"pip install 'onbeat\[sim\]'"), start_twin(tmp_path):
        pass


def test_a_twin_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(TwinFailed, match=r"twin\.log"), start_twin(tmp_path, startup_timeout_s=0.05):
        pass


def test_the_handle_says_where_everything_is(tmp_path: Path) -> None:
    with start_twin(tmp_path, has_cameras=False) as twin:
        assert isinstance(twin, RunningTwin)
        assert Path(twin.port).exists()
        assert twin.frames == {}
        assert twin.run_dir == tmp_path
    assert not psutil.pid_exists(twin.pid)
