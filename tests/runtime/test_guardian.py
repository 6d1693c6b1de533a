"""The guardian against a runtime that dies, hangs, ends well, or only sleeps; and on the twin, which judges it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from onbeat.drivers.twin.client import RunningTwin, start_twin
from onbeat.drivers.twin.inject import UNPLUGGED, Injection, inject
from onbeat.drivers.twin.records import read_torque
from onbeat.runtime import heartbeat, mailbox
from onbeat.runtime.guardian import LOOK_S, PARK_PERIOD_S, Patience, parking_way
from onbeat.runtime.heartbeat import GUARDED, IDLE, Beat, Heartbeat

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]


class TestPatience:
    def silence(self, elapsed_s: list[float]) -> list[bool]:
        patience = Patience(limit_s=0.052)
        patience.is_over(Beat(GUARDED, 7, False), 0.0)
        return [patience.is_over(Beat(GUARDED, 7, False), s) for s in elapsed_s]

    def test_ends_after_the_limit_and_not_before(self):
        assert self.silence([LOOK_S] * 11) == [False] * 10 + [True]

    def test_a_beat_begins_it_anew(self):
        patience = Patience(limit_s=0.052)
        for tick in range(100):
            assert not patience.is_over(Beat(GUARDED, tick // 9, False), LOOK_S)

    def test_a_pause_of_the_machine_is_nobodys_fault(self):
        assert self.silence([30.0, LOOK_S, LOOK_S]) == [False] * 3


class TestHeartbeat:
    def test_words_are_the_loops(self):
        assert (heartbeat.TICKS, heartbeat.ENDED_NS) == (mailbox.TICKS, mailbox.ENDED_NS)
        assert mailbox.PROGRESS_WORDS <= heartbeat.WATCHED < heartbeat.WORDS

    def test_a_look_shows_what_the_loop_wrote(self):
        beat = Heartbeat.create()
        words = np.frombuffer(beat.words, np.int64)
        assert beat.look() == (IDLE, 0, False)
        beat.set_phase(GUARDED)
        assert not beat.look().is_due, "no tick yet"
        words[mailbox.TICKS] = 5
        assert Heartbeat(beat.path).look().is_due
        words[mailbox.ENDED_NS] = 1
        assert not beat.look().is_due, "it ended by itself"
        beat.unlink()
        beat.unlink()
        assert not beat.path.exists()


class TestParkingWay:
    def test_starts_and_ends_at_rest_and_is_never_faster_than_asked(self):
        goals = np.array([[0, 4000], *parking_way([0, 4000], [1500, 1000], 300.0)])
        speed = np.diff(goals, axis=0) / PARK_PERIOD_S
        assert goals[-1].tolist() == [1500, 1000]
        assert np.abs(speed).max() <= 300.0 + 0.5 / PARK_PERIOD_S
        assert np.abs(speed[[0, -1]]).max() <= 0.5 / PARK_PERIOD_S

    def test_a_short_way_takes_its_time(self):
        assert len(list(parking_way([2048], [2050], 300.0))) >= 25


def test_it_is_small():
    """No NumPy, no numba: what it imports is the standard library and five small modules."""
    code = "import sys, onbeat.runtime.guardian; print([m for m in ('numpy', 'numba', 'serial') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


VICTIM = """
import os, signal, sys, time, json, numpy as np

signal.signal(signal.SIGUSR1, lambda *_: b"x" * 1_000_000_000)
from onbeat.calibration.joints import FACTORY, load_joints
from onbeat.drivers.feetech.device import FeetechBus
from onbeat.runtime.guard import Guard
from onbeat.runtime.robots import build_robot, from_json
robot = build_robot(from_json(json.loads(sys.argv[1])))
bus = FeetechBus(robot.config.port, load_joints(FACTORY, robot.joints))
with Guard(robot, bus) as guard:
    guard.arm()
    bus.enable(True)
    start = bus.wire.position_rad.copy()
    print("moving", guard.pid, flush=True)
    for k in range(int(sys.argv[2])):
        bus.write(start + 0.2 * np.sin(k / 40))
        guard.words[0] += 1
        time.sleep(0.01)
    guard.words[5] = 1
    guard.release()
"""


class Victim:
    """A process that moves the twin's arm under a guardian."""

    def __init__(self, twin: RunningTwin, on_exit: str, ticks: int = 100_000, beats: int = 40) -> None:
        from onbeat.runtime.robots import as_json, load_robot

        config = replace(
            load_robot("so101-twin").config, port=twin.port, on_exit=on_exit, loop_rate_hz=100.0, missed_beats=beats
        )
        command = [sys.executable, "-c", VICTIM, json.dumps(as_json(config)), str(ticks)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.guardian_pid = int(self.process.stdout.readline().split()[1])
        time.sleep(0.5)

    def rest(self) -> list[dict[str, Any]]:
        """What the guardian said, once neither is there any more."""
        assert self.process.stdout is not None
        events = [json.loads(line) for line in self.process.stdout]
        self.process.wait()
        return events


@pytest.fixture
def twin(tmp_path: Path) -> Iterator[RunningTwin]:
    with start_twin(tmp_path / "twin", has_cameras=False, attempt_timeout_s=1e6) as running:
        yield running


class MemoryGroup:
    """A control group, of version 1 or 2, whose processes may use so much memory; for root where there are any."""

    MEMORY_MB = 50  # beside what they had before

    def __init__(self) -> None:
        old, name = Path("/sys/fs/cgroup/memory"), f"onbeat-test-{os.getpid()}"
        self.folder = (old if old.is_dir() else Path("/sys/fs/cgroup")) / name
        self.limit, self.events = "memory.max", "memory.events"
        if old.is_dir():
            self.limit, self.events = "memory.limit_in_bytes", "memory.oom_control"

    def __enter__(self) -> "MemoryGroup":
        try:
            self.folder.mkdir()
            (self.folder / self.limit).write_text(str(self.MEMORY_MB * 2**20))
        except OSError as error:
            self.__exit__()
            pytest.skip(f"no control groups of memory here ({error})")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.folder.rmdir()

    def take(self, *pids: int) -> None:
        for pid in pids:
            (self.folder / "cgroup.procs").write_text(str(pid))

    def kills(self) -> int:
        """How many processes the kernel has killed for memory."""
        found = re.search(r"oom_kill (\d+)", (self.folder / self.events).read_text())
        assert found is not None, "an older kernel does not count them"
        return int(found[1])


def let_go(twin: RunningTwin, since_ns: int) -> bool:
    return any(line.t_ns > since_ns and not any(line.holds) for line in read_torque(twin.run_dir))


@pytest.mark.slow
class TestOnTheTwin:
    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
    def test_whatever_kills_the_runtime_the_arm_is_let_go(self, twin: RunningTwin, how: signal.Signals):
        victim, since_ns = Victim(twin, "relax"), time.monotonic_ns()
        victim.process.send_signal(how)
        (event,) = victim.rest()
        assert event["fault"] == ("RUNTIME_HUNG" if how == signal.SIGSTOP else "RUNTIME_DEAD")
        assert event["did"] == "relax"
        assert let_go(twin, since_ns)
        first = next(line.t_ns for line in read_torque(twin.run_dir) if line.t_ns > since_ns)
        assert 0.38e9 <= first - since_ns <= 2e9, "40 beats of 10 ms, and not much more"

    def test_the_kernel_kills_the_runtime_for_its_memory(self, twin: RunningTwin):
        """Before the guardian would call it hung, which a process that fills its memory may look like for a while."""
        victim, since_ns = Victim(twin, "relax", beats=300), time.monotonic_ns()
        with MemoryGroup() as group:
            group.take(victim.process.pid)
            victim.process.send_signal(signal.SIGUSR1)
            (event,) = victim.rest()
            assert victim.process.returncode == -signal.SIGKILL
            assert group.kills() == 1
        assert (event["fault"], event["did"]) == ("RUNTIME_DEAD", "relax")
        assert let_go(twin, since_ns)

    def test_a_parked_arm_went_there_slowly(self, twin: RunningTwin):
        victim, since_ns = Victim(twin, "park"), 0
        victim.process.kill()
        (event,) = victim.rest()
        assert event["did"] == "park"
        assert let_go(twin, since_ns)
        where = np.array(read_torque(twin.run_dir)[-1].position_rad)
        assert where[:5] == pytest.approx([0.0, -1.7, 1.6, 0.9, 0.0], abs=0.1)

    def test_hold_leaves_the_arm_where_it_was_sent(self, twin: RunningTwin):
        victim, since_ns = Victim(twin, "hold"), time.monotonic_ns()
        victim.process.kill()
        assert victim.rest()[0]["did"] == "hold"
        assert not let_go(twin, since_ns)

    def test_it_writes_nothing_while_the_runtime_is_well(self, twin: RunningTwin):
        victim = Victim(twin, "relax", ticks=150)
        memory_mb = psutil.Process(victim.guardian_pid).memory_full_info().uss / 2**20
        assert victim.rest() == []
        assert memory_mb < 20
        assert not let_go(twin, 0)

    def test_a_cable_that_was_pulled_is_waited_for(self, twin: RunningTwin):
        victim, now_ns = Victim(twin, "relax"), time.monotonic_ns()
        inject(twin.run_dir, Injection(UNPLUGGED, now_ns, now_ns + 1_500_000_000))
        time.sleep(0.2)
        victim.process.kill()
        (event,) = victim.rest()
        assert event["did"] == "relax"
        assert let_go(twin, now_ns + 1_400_000_000)
