"""A session on fake devices: whatever fails, the arm is brought to rest first and the reason comes out."""

import errno
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onbeat.drivers.feetech.errors import NoReply, PortLost, ServoOverload
from onbeat.drivers.feetech.fake import FakeBus
from onbeat.drivers.interfaces import Frame, JointState
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime import realtime
from onbeat.runtime.daemon import SPARE_BYTES, RunEnded, Session, loaded_modules, outcome
from onbeat.runtime.engine import PolicySpec, SamplerSpec
from onbeat.runtime.faults import Fault, Level
from onbeat.runtime.flight.header import make_header
from onbeat.runtime.flight.reader import Log, read_log
from onbeat.runtime.flight.recorder import Recorder
from onbeat.runtime.loop import compile_ahead
from onbeat.runtime.policy import PolicyOutput, StageTimes
from onbeat.runtime.robots import Robot, build_robot, load_robot
from onbeat.runtime.safety import onsets, report

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
    """Chunks that sway the arm around `middle_rad`; `fails_at` is the inference that raises."""

    middle_rad = 0.0

    def __init__(self, robot: Robot, fails_at: int = 10**6) -> None:
        self.robot, self.fails_at, self.count = robot, fails_at, 0
        self.spec = SPEC
        self.language = None

    def infer(self, observation, instruction, *, noise=None, prev_chunk=None, delay=0, guidance=None) -> PolicyOutput:  # noqa: ARG002
        self.count += 1
        if self.count == self.fails_at:
            raise OnbeatError("the state is not finite: check the sensor")
        sway = self.middle_rad + 0.3 * np.sin(np.arange(ROWS) / 3 + self.count)[:, None] * np.ones(JOINTS)
        empty = np.zeros((0, 0), np.float32)
        return PolicyOutput(empty, self.robot.embodiment.split(sway), empty, empty, StageTimes(1, 1, 1), empty, None)


class CountingBus(FakeBus):
    """A fake bus that counts faults, as the session's record asks, and loses its port after `lives` goals.

    on_write, on_read: called before each. held: joints that something keeps at 0. obeys: whether torque goes off.
    was_enabled, off_s: whether torque was ever on, and when it went off.
    """

    lives = 10**6
    obeys = True
    held = ()
    was_enabled = False
    off_s = 0.0
    on_write: Callable[[], None] = staticmethod(lambda: None)
    on_read: Callable[[], None] = staticmethod(lambda: None)

    def faults(self) -> dict[str, int]:
        return {}

    def write(self, goal_rad: np.ndarray) -> None:
        self.on_write()
        self.lives -= 1
        if self.lives < 0:
            raise PortLost("the port is gone")
        super().write(goal_rad)

    def read(self, into: JointState) -> None:
        self.on_read()
        super().read(into)
        self.position_rad[list(self.held)] = into.position_rad[list(self.held)] = 0.0

    def enable(self, on: bool, /) -> np.ndarray:
        self.was_enabled |= on
        if not on and not self.obeys:
            raise NoReply("servo 1 did not reply")
        self.off_s = 0.0 if on else time.monotonic()
        return super().enable(on)


class WatchedGuard:
    """A guardian that only notes what it is told; after `looks` of the session it does not look any more."""

    def __init__(self, looks: int = 10**6) -> None:
        self.words = np.zeros(16, np.int64)
        self.looks, self.told, self.way = looks, list[str](), 0

    def arm(self) -> None:
        self.told.append("arm")

    def release(self) -> None:
        self.told.append("release")

    def set_limp(self) -> None:
        self.told.append("limp")

    def count_way(self) -> None:
        self.way += 1

    def is_watching(self) -> bool:
        self.looks -= 1
        return self.looks >= 0


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


def session(
    folder: Path, *, seconds: float = 1.0, fails_at: int = 10**6, on_exit: str = "hold", **told: Any
) -> Session:
    config = replace(load_robot("so101-twin").config, on_exit=on_exit, cameras={"top": "", "wrist": ""}, **told)
    robot = build_robot(config)
    bus = CountingBus(robot.joints)
    cameras = [LiveCamera(view) for view in robot.embodiment.views]
    policy = SwingingPolicy(robot, fails_at)
    said: list = []
    recorder = Recorder(folder, make_header({}, robot, SPEC, mode="async"))
    guard = WatchedGuard()
    return Session(robot, policy, bus, cameras, "sway", seconds, said.append, recorder, guard=guard)  # pyright: ignore[reportArgumentType]


def after(seconds: float, act: Callable[..., None], *told: Any) -> None:
    """Do something in the middle of a run."""
    timer = threading.Timer(seconds, act, told)
    timer.daemon = True
    timer.start()


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
    assert not run.bus.is_enabled


def test_an_arm_parks_slowly_and_then_relaxes(log_folder: Path):
    run = session(log_folder, seconds=0.5, on_exit="park")
    run.run()
    goals = np.array(run.bus.goals)
    assert goals[-1] == pytest.approx(run.robot.config.park_q, abs=0.01)
    assert not run.bus.is_enabled


class TestLimp:
    """A servo that cannot hold where it is: torque off, whatever the robot file says and whatever came first."""

    @pytest.mark.parametrize("on_exit", ["hold", "park"])
    def test_counts_also_after_another_fault(self, on_exit: str, log_folder: Path):
        run = session(log_folder, seconds=30.0, on_exit=on_exit)
        after(0.5, lambda: [report(run.state.safety, fault) for fault in (Fault.SERVO_OVERLOAD, Fault.SERVO_SENSOR)])
        with pytest.raises(RunEnded, match="SERVO_OVERLOAD"):
            run.run()
        assert not run.bus.is_enabled
        assert run.guard.told == ["arm", "limp", "release"]
        assert run.guard.way == 0, "not driven without an encoder"

    def test_counts_also_while_a_stop_brakes(self, log_folder: Path):
        def fail() -> None:
            if run.state.safety.ended_by[0] == Fault.STOP_REQUESTED:
                report(run.state.safety, Fault.SERVO_SENSOR)

        run = session(log_folder, seconds=0.6)
        run.bus.on_write = fail
        run.run()
        assert onsets(run.state.safety)["SERVO_SENSOR"] == 1
        assert not run.bus.is_enabled

    def test_is_left_to_the_guardian_as_such(self, log_folder: Path):
        run = session(log_folder, seconds=30.0)
        run.bus.obeys = False
        after(0.5, report, run.state.safety, Fault.SERVO_SENSOR)
        with pytest.raises(RunEnded, match="SERVO_SENSOR"):
            run.run()
        assert run.guard.told == ["arm", "limp"]

    def test_waits_for_nothing_else_that_the_run_does(self, log_folder: Path, monkeypatch: pytest.MonkeyPatch):
        run, ended_s = session(log_folder, seconds=30.0), list[float]()
        infer, is_slow = run.policy.infer, threading.Event()

        def inferring(*args, **told) -> PolicyOutput:
            if is_slow.is_set():
                time.sleep(1.5)
                ended_s.append(time.monotonic())
            return infer(*args, **told)

        def fail() -> None:
            is_slow.set()
            time.sleep(0.3)
            report(run.state.safety, Fault.SERVO_SENSOR)

        monkeypatch.setattr(run.policy, "infer", inferring)
        after(0.5, fail)
        with pytest.raises(RunEnded, match="SERVO_SENSOR"):
            run.run()
        assert 0 < run.bus.off_s < ended_s[0] - 0.5


class TestTheThreadThatWaits:
    """Whatever it stumbles over, the arm is brought to its end first."""

    @pytest.mark.parametrize("what", ["free_bytes", "say"])
    def test_what_it_raises_ends_the_run_with_its_reason(self, what: str, log_folder: Path):
        def vanished(_: object) -> int:
            raise FileNotFoundError("the run's folder is gone")

        run = session(log_folder, seconds=30.0, on_exit="relax")
        after(0.7, setattr, run, what, vanished)
        with pytest.raises(FileNotFoundError, match="the run's folder is gone"):
            run.run()
        assert run.guard.told == ["arm", "release"]
        assert not run.bus.is_enabled
        assert_came_to_rest(run)

    def test_that_cannot_start_a_thread_leaves_none_behind(self, log_folder: Path, monkeypatch: pytest.MonkeyPatch):
        start = threading.Thread.start

        def starting(thread: threading.Thread) -> None:
            if thread.name == "inference":
                raise RuntimeError("can't start new thread")
            start(thread)

        run = session(log_folder, seconds=30.0, on_exit="relax")
        monkeypatch.setattr(threading.Thread, "start", starting)
        with pytest.raises(RuntimeError, match="new thread"):
            run.run()
        assert not run.bus.is_enabled
        assert run.loop.status.ticks < 40
        assert [thread for thread in threading.enumerate() if thread.name in ("loop", "records")] == []

    def test_that_stands_still_does_not_keep_the_arm(self, log_folder: Path):
        """Nobody reads what it says: a fault ends the arm all the same."""
        run, reads = session(log_folder, seconds=30.0, on_exit="relax"), threading.Event()
        after(0.5, setattr, run, "say", lambda _: reads.wait(10.0))
        after(1.0, report, run.state.safety, Fault.SERVO_OVERLOAD)
        after(2.0, reads.set)
        with pytest.raises(RunEnded, match="SERVO_OVERLOAD"):
            run.run()
        assert 0 < run.bus.off_s < time.monotonic() - 0.3


class TestPark:
    def test_starts_from_the_last_goal_and_not_from_where_the_joint_is(self, log_folder: Path):
        run = session(log_folder, seconds=0.8, on_exit="park")
        run.policy.middle_rad, run.bus.held = 0.6, (5,)
        run.run()
        goals = np.array(run.bus.goals)
        first = len(goals) - run.guard.way
        assert abs(goals[first - 1, 5]) > 0.1, "the gripper holds something"
        assert np.abs(goals[first] - goals[first - 1]).max() < 0.01
        assert run.guard.told == ["arm", "release"]

    def test_is_not_kept_back_by_what_servos_report(self, log_folder: Path):
        def overload() -> None:
            if run.loop.status.ended_ns:
                raise ServoOverload("servo 3 reports OVERLOAD")

        run = session(log_folder, seconds=30.0, on_exit="park")
        run.bus.on_read = overload
        after(0.5, report, run.state.safety, Fault.SERVO_OVERLOAD)
        with pytest.raises(RunEnded, match="SERVO_OVERLOAD"):
            run.run()
        assert run.bus.goals[-1] == pytest.approx(run.robot.config.park_q, abs=0.01)
        assert not run.bus.is_enabled

    def test_that_cannot_be_is_left_to_the_guardian_with_the_first_reason(self, log_folder: Path):
        run = session(log_folder, seconds=30.0, on_exit="park")
        run.robot = replace(run.robot, config=replace(run.robot.config, park_speed_rad_s=0.0))
        after(0.5, report, run.state.safety, Fault.SERVO_OVERLOAD)
        with pytest.raises(RunEnded, match="SERVO_OVERLOAD"):
            run.run()
        assert run.guard.told == ["arm"]


def test_a_guardian_that_stands_still_ends_the_run(log_folder: Path):
    run = session(log_folder, seconds=30.0)
    run.guard.looks = 3
    with pytest.raises(RunEnded, match="GUARDIAN_LOST"):
        run.run()
    assert_came_to_rest(run)


def test_a_reader_that_does_not_read_keeps_nobody():
    """A supervisor that is stopped: the daemon says status lines for as long as they fit into the pipe."""
    code = (
        "from onbeat.runtime.daemon import say_on_stdout as say\n"
        "for k in range(2000): say({'event': 'status', 'text': 'x' * 200})\n"
        "import sys; print('done', file=sys.stderr)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.read() == b"done\n"
        finally:
            process.kill()


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
    assert run.bus.goals == []
    assert threading.active_count() == 1 or all(t.name not in ("loop", "inference") for t in threading.enumerate())


def test_a_pulled_cable_ends_the_run_with_its_reason(log_folder: Path):
    run = session(log_folder, seconds=30.0)
    run.bus.lives = 50
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


def test_stop_before_the_first_tick_moves_nothing(log_folder: Path):
    run = session(log_folder, seconds=30.0, on_exit="relax")
    run.stop.set()
    run.run()
    assert run.bus.goals == []
    assert not run.bus.was_enabled
    assert run.guard.told == []
    assert run.loop.status.ticks == 0
    assert log_of(run).outcome is not None


def test_the_modules_of_a_process_are_told():
    assert "numpy" in loaded_modules()
    assert "onbeat.runtime.daemon" in loaded_modules()
