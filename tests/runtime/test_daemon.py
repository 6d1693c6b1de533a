"""A session on fake devices: whatever fails, the arm is brought to rest first and the reason comes out."""

import errno
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onbeat.drivers.feetech.errors import PortLost
from onbeat.drivers.feetech.fake import FakeBus
from onbeat.drivers.interfaces import Frame
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime import realtime
from onbeat.runtime.daemon import SPARE_BYTES, Session, loaded_modules, outcome
from onbeat.runtime.engine import PolicySpec, SamplerSpec
from onbeat.runtime.faults import Level
from onbeat.runtime.flight.header import make_header
from onbeat.runtime.flight.reader import Log, read_log
from onbeat.runtime.flight.recorder import Recorder
from onbeat.runtime.loop import compile_ahead
from onbeat.runtime.policy import PolicyOutput, StageTimes
from onbeat.runtime.robots import Robot, build_robot, load_robot
from onbeat.runtime.safety import onsets

pytestmark = pytest.mark.alone

ROWS, JOINTS = 16, 6
SAMPLER = SamplerSpec(1, 1, "off", gate_lambda=0.0, gate_temperature=1.0, gate_directions=0)
SPEC = PolicySpec(2, 8, 1, ROWS, 1, trained_delay=0, sampler=SAMPLER)
RATE_HZ = load_robot("so101-twin").config.loop_rate_hz


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """Before any clock of a test runs."""
    compile_ahead(load_robot("so101-twin").limits)


class LiveCamera:
    """A frame every 100 ms, until `frozen_ns`; black once it is covered."""

    def __init__(self, name: str) -> None:
        self.name, self.frozen_ns, self.is_covered = name, 0, False

    def latest(self) -> Frame:
        t_ns = (self.frozen_ns or time.monotonic_ns()) // 100_000_000 * 100_000_000
        rgb = np.random.default_rng(t_ns).integers(0, 1 if self.is_covered else 255, (8, 8, 3), np.uint8)
        return Frame(t_ns // 100_000_000, t_ns, rgb)

    def close(self) -> None: ...


class SwingingPolicy:
    """Chunks that sway the arm; `fails_at` is the inference that raises."""

    def __init__(self, robot: Robot, fails_at: int = 10**6) -> None:
        self.robot, self.fails_at, self.count = robot, fails_at, 0
        self.spec = SPEC
        self.language = None

    def infer(self, observation, instruction, *, noise=None, prev_chunk=None, delay=0, guidance=None) -> PolicyOutput:  # noqa: ARG002
        self.count += 1
        if self.count == self.fails_at:
            raise OnbeatError("the state is not finite: check the sensor")
        sway = 0.3 * np.sin(np.arange(ROWS) / 3 + self.count)[:, None] * np.ones(JOINTS)
        empty = np.zeros((0, 0), np.float32)
        return PolicyOutput(empty, self.robot.embodiment.split(sway), empty, empty, StageTimes(1, 1, 1), empty, None)


class CountingBus(FakeBus):
    """A fake bus that counts faults, as the session's record asks, and loses its port after `lives` goals."""

    lives = 10**6

    def faults(self) -> dict[str, int]:
        return {}

    def write(self, goal_rad: np.ndarray) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise PortLost("the port is gone")
        super().write(goal_rad)


@pytest.fixture(autouse=True)
def _ordinary_process() -> Iterator[None]:
    """A session's loop thread changes the interpreter's settings for its process; give them back."""
    interval = sys.getswitchinterval()
    yield
    gc.unfreeze()
    gc.enable()
    sys.setswitchinterval(interval)


@pytest.fixture
def log_folder(tmp_path: Path) -> Path:
    return tmp_path / "log"


def session(folder: Path, *, seconds: float = 1.0, fails_at: int = 10**6, on_exit: str = "hold") -> Session:
    config = replace(load_robot("so101-twin").config, on_exit=on_exit, cameras={"top": "", "wrist": ""})
    robot = build_robot(config)
    bus = CountingBus(robot.joints)
    cameras = [LiveCamera(view) for view in robot.embodiment.views]
    policy = SwingingPolicy(robot, fails_at)
    said: list = []
    recorder = Recorder(folder, make_header({}, robot, SPEC, mode="async"))
    return Session(robot, policy, bus, cameras, "sway", seconds, said.append, recorder)  # pyright: ignore[reportArgumentType]


def log_of(run: Session) -> Log:
    """What the run left behind, once it is over."""
    run.recorder.finish(run.loop.records, outcome(run))
    return read_log(run.recorder.folder)


def assert_came_to_rest(run: Session) -> Log:
    log = log_of(run)
    goals = log.records("/tick")["goal_rad"]
    speed = np.diff(goals, axis=0) * RATE_HZ
    assert np.abs(speed).max() > 0.2
    assert np.abs(np.diff(speed, axis=0)).max() <= 20.0 / RATE_HZ * (1 + 1e-9)
    assert (goals[-1] == goals[-2]).all()
    return log


def test_memory_is_locked_before_the_first_inference_and_not_beside_one(
    log_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    run, order, threads = session(log_folder, seconds=0.3), list[str](), set[str]()
    infer = run.policy.infer

    def lock() -> None:
        order.append("lock")
        threads.add(threading.current_thread().name)

    def inferring(*args, **told) -> PolicyOutput:
        order.append("infer")
        return infer(*args, **told)

    monkeypatch.setitem(realtime.OF_PROCESS, "memory lock", lock)
    monkeypatch.setattr(run.policy, "infer", inferring)
    run.run()
    assert order[0] == "lock"
    assert order.count("lock") == 1
    assert order.count("infer") > 2
    assert threads == {threading.current_thread().name}
    assert run.real_time["memory lock"] == "got"
    log_of(run)


def test_runs_for_its_time_and_comes_to_rest(log_folder: Path):
    run = session(log_folder)
    run.run()
    status = run.status()
    assert status["chunks"] >= 5
    assert 0.9 <= status["t_s"] <= 1.6
    assert len(run.warm_up_ns) == 2
    assert_came_to_rest(run)


def test_an_error_in_the_inference_thread_stops_the_run_with_its_reason(log_folder: Path):
    run = session(log_folder, seconds=30.0, fails_at=9)
    with pytest.raises(OnbeatError, match="not finite"):
        run.run()
    assert run.status()["t_s"] < 5
    assert_came_to_rest(run)


def test_a_disk_that_fills_up_ends_the_run_by_name(log_folder: Path):
    run = session(log_folder, seconds=30.0)
    run.free_bytes = lambda _: 10**12
    filling = threading.Timer(1.0, setattr, (run, "free_bytes", lambda _: SPARE_BYTES - 1))
    filling.start()
    with pytest.raises(OnbeatError, match="DISK_FULL"):
        run.run()
    log = assert_came_to_rest(run)
    assert log.problems == ()
    assert ("fault", "DISK_FULL") in [(event["event"], event["name"]) for event in log.events]


def test_a_disk_that_takes_nothing_any_more_ends_the_run_by_name(log_folder: Path, monkeypatch: pytest.MonkeyPatch):
    run = session(log_folder, seconds=30.0)
    synced, fsync = list[int](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: no_space() if len(synced) == 3 else (fsync(fd), synced.append(fd)))
    with pytest.raises(OnbeatError, match="DISK_FULL"):
        run.run()
    log = log_of(run)
    assert run.recorder.error == os.strerror(errno.ENOSPC)
    assert run.recorder.dropped["/tick"] > 0
    assert len(log.records("/tick")) > 0
    assert "cut off" in log.problems[0]


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB of its own; for root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Until nothing goes in any more."""
    with (folder / "other").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 1_000_000):
            pass


def test_a_disk_that_is_really_full_ends_the_run_by_name(small_disk: Path):
    run = session(small_disk, seconds=30.0)
    filling = threading.Timer(1.0, fill, (small_disk,))
    filling.start()
    with pytest.raises(OnbeatError, match="DISK_FULL"):
        run.run()
    filling.join()
    assert shutil.disk_usage(small_disk).free < 10_000_000  # what the log gave back
    assert 0.5 <= run.status()["t_s"] <= 20
    assert (run.state.command_v == 0).all()
    assert len(log_of(run).records("/tick")) > 0  # what fitted in can be read


def test_an_arm_relaxes_at_the_end_where_its_file_says_so(log_folder: Path):
    run = session(log_folder, seconds=0.5, on_exit="relax")
    run.run()
    assert not run.bus.is_enabled  # pyright: ignore[reportAttributeAccessIssue]


def test_an_arm_parks_slowly_and_then_relaxes(log_folder: Path):
    run = session(log_folder, seconds=0.5, on_exit="park")
    run.run()
    goals = np.array(run.bus.goals)  # pyright: ignore[reportAttributeAccessIssue]
    assert goals[-1] == pytest.approx(run.robot.config.park_q, abs=0.01)
    assert not run.bus.is_enabled  # pyright: ignore[reportAttributeAccessIssue]


def test_cameras_that_show_nothing_hold_the_arm(log_folder: Path):
    run = session(log_folder, seconds=1.5)
    cover = threading.Timer(0.6, lambda: [setattr(camera, "is_covered", True) for camera in run.cameras])
    cover.start()
    run.run()
    assert onsets(run.state.safety)["CAMERA_BLANK"] == 1
    log = assert_came_to_rest(run)
    assert log.records("/tick")["level"][-2] == Level.HOLD


def test_an_error_of_the_first_inference_moves_nothing(log_folder: Path):
    run = session(log_folder, fails_at=1)
    with pytest.raises(OnbeatError, match="not finite"):
        run.run()
    assert run.bus.goals == []  # pyright: ignore[reportAttributeAccessIssue]
    assert threading.active_count() == 1 or all(t.name not in ("loop", "inference") for t in threading.enumerate())


def test_a_pulled_cable_ends_the_run_with_its_reason(log_folder: Path):
    run = session(log_folder, seconds=30.0)
    run.bus.lives = 50  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(PortLost, match="plug the adapter in again"):
        run.run()
    assert 50 <= run.loop.status.ticks < 200


@pytest.mark.slow
def test_cameras_that_freeze_leave_the_arm_at_rest_and_the_loop_running(log_folder: Path):
    run = session(log_folder, seconds=3.2)
    freeze = threading.Timer(0.5, lambda: [setattr(c, "frozen_ns", time.monotonic_ns()) for c in run.cameras])
    freeze.start()
    run.run()
    assert run.status()["stale"] > 0
    ticks = log_of(run).records("/tick")
    assert (ticks["goal_rad"][-50:] == ticks["goal_rad"][-1]).all()
    assert ticks["flags"][-60] & 1


def test_stop_before_the_first_tick_moves_nothing_far(log_folder: Path):
    run = session(log_folder, seconds=30.0)
    run.stop.set()
    run.run()
    assert run.loop.status.ticks <= 40  # 0.2 s, on a busy machine
    assert (np.diff(log_of(run).records("/tick")["goal_rad"], axis=0) == 0).all()


def test_the_modules_of_a_process_are_told():
    assert "numpy" in loaded_modules()
    assert "onbeat.runtime.daemon" in loaded_modules()
