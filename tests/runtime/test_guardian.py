"""The guardian against a runtime that dies, hangs, ends well, or only sleeps; and on the twin, which judges it."""

import json
import math
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
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from onbeat.drivers.feetech.device import JointCalibration
from onbeat.drivers.feetech.packets import encode_packet
from onbeat.drivers.feetech.tables import REGISTER, Instruction
from onbeat.drivers.twin.client import RunningTwin, start_twin
from onbeat.drivers.twin.inject import UNPLUGGED, Injection, inject
from onbeat.drivers.twin.records import read_torque
from onbeat.runtime import guardian, heartbeat, mailbox
from onbeat.runtime.guard import MOST_IDLE_LOOKS, Guard, GuardianFailed
from onbeat.runtime.guardian import (
    LOOK_S,
    PARK_PERIOD_S,
    REPLY_S,
    GuardianConfig,
    Port,
    Reach,
    Silence,
    Unreachable,
    act,
    parking_way,
)
from onbeat.runtime.heartbeat import DONE, GUARDED, IDLE, Beat, Heartbeat
from onbeat.runtime.robots import as_json, load_robot

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]


@pytest.fixture
def beat() -> Iterator[Heartbeat]:
    made = Heartbeat.create()
    yield made
    made.unlink()


class TestSilence:
    def silence(self, elapsed_s: list[float]) -> list[bool]:
        silence = Silence()
        silence.after(Beat(GUARDED, 7, False), 0.0)
        return [silence.after(Beat(GUARDED, 7, False), s) >= 0.052 for s in elapsed_s]

    def test_reaches_the_limit_and_not_before(self):
        assert self.silence([LOOK_S] * 11) == [False] * 10 + [True]

    def test_a_beat_begins_it_anew(self):
        silence = Silence()
        for tick in range(100):
            assert silence.after(Beat(GUARDED, tick // 9, False), LOOK_S) < 0.052

    def test_a_goal_on_the_way_to_park_is_a_beat(self):
        silence = Silence()
        assert silence.after(Beat(GUARDED, 7, True, 1), LOOK_S) == 0.0
        assert silence.after(Beat(GUARDED, 7, True, 2), LOOK_S) == 0.0

    def test_a_pause_of_the_machine_is_nobodys_fault(self):
        assert self.silence([30.0, LOOK_S, LOOK_S]) == [False] * 3


class TestHeartbeat:
    def test_words_are_the_loops(self):
        assert (heartbeat.TICKS, heartbeat.ENDED_NS) == (mailbox.TICKS, mailbox.ENDED_NS)
        own = [heartbeat.WAY, heartbeat.LIMP, heartbeat.LOOKS, heartbeat.PHASE]
        assert mailbox.PROGRESS_WORDS <= min(own) <= max(own) < heartbeat.WORDS
        assert len(set(own)) == len(own)

    def test_a_look_shows_what_the_runtime_wrote(self, beat: Heartbeat):
        words = np.frombuffer(beat.words, np.int64)
        assert beat.look() == (IDLE, 0, False, 0)
        assert not beat.is_limp
        beat.set_phase(GUARDED)
        assert not beat.look().is_ticking, "no tick yet"
        words[mailbox.TICKS] = 5
        assert Heartbeat(beat.path).look().is_ticking
        words[mailbox.ENDED_NS] = 1
        assert not beat.look().is_ticking, "it ended by itself"
        beat.count_way()
        beat.set_limp()
        assert Heartbeat(beat.path).look() == (GUARDED, 5, True, 1)
        assert Heartbeat(beat.path).is_limp

    def test_it_leaves_no_name(self, beat: Heartbeat):
        beat.unlink()
        beat.unlink()
        assert not beat.path.exists()


class Alive:
    """A runtime that is there."""

    def is_dead(self) -> bool:
        return False

    def is_dying(self) -> bool:
        return False


class TestWatch:
    """A process that is there and makes no progress, whatever it was doing."""

    LIMIT_S, STANDING_S = 0.03, 0.15

    def watch(
        self, beat: Heartbeat, monkeypatch: pytest.MonkeyPatch, *, until_s: float = 5.0
    ) -> tuple[str | None, float]:
        """What it found, and after how long in its own time; ends as if all were well after until_s."""
        slept_s = [0.0]

        def sleep(seconds: float) -> None:
            slept_s[0] += seconds
            if slept_s[0] >= until_s:
                beat.set_phase(DONE)

        monkeypatch.setattr(guardian, "STANDING_S", self.STANDING_S)
        monkeypatch.setattr(guardian.time, "monotonic", lambda: slept_s[0])
        monkeypatch.setattr(guardian.time, "sleep", sleep)
        return guardian.watch(beat, Alive(), self.LIMIT_S), slept_s[0]  # pyright: ignore[reportArgumentType]

    def test_without_torque_is_nobodys_affair(self, beat: Heartbeat, monkeypatch: pytest.MonkeyPatch):
        assert self.watch(beat, monkeypatch) == (None, pytest.approx(5.0, abs=0.01))

    @pytest.mark.parametrize(
        ("ticks", "ended_ns", "limit_s"),
        [(0, 0, STANDING_S), (7, 0, LIMIT_S), (7, 1, STANDING_S)],
        ids=["before the first tick", "ticking", "after the last"],
    )
    def test_is_found_hung(self, ticks: int, ended_ns: int, limit_s: float, beat: Heartbeat, monkeypatch):
        words = np.frombuffer(beat.words, np.int64)
        words[mailbox.TICKS], words[mailbox.ENDED_NS] = ticks, ended_ns
        beat.set_phase(GUARDED)
        assert self.watch(beat, monkeypatch) == ("RUNTIME_HUNG", pytest.approx(limit_s, abs=2.5 * LOOK_S))

    def test_counts_its_looks(self, beat: Heartbeat, monkeypatch: pytest.MonkeyPatch):
        self.watch(beat, monkeypatch, until_s=1.0)
        assert beat.looks == pytest.approx(1.0 / LOOK_S, abs=2)


class Clock:
    """Seconds that pass while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(guardian.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(guardian.time, "sleep", self.wait)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


class Servos:
    """A line with six servos. silent: those that do not answer. torque, goals: what the servos were told.

    takes: goals after which the cable is pulled, once, for out_s. back_s: until when the port is not there.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock, self.silent, self.takes, self.out_s, self.back_s = clock, set[int](), 10**9, 0.0, 0.0
        self.torque, self.goals, self.reply = dict.fromkeys(range(1, 7), 1), [[2048] * 6], b""

    def check(self) -> None:
        if self.clock.now_s < self.back_s:
            raise Unreachable("the port is gone")

    def take(self, packet: bytes) -> None:
        """A request, as it comes over the wire."""
        self.check()
        servo_id, instruction, address, data = packet[2], packet[4], packet[5], packet[6:-1]
        is_goal = address == REGISTER["goal_position"].address
        if instruction == Instruction.SYNC_WRITE and is_goal:
            self.goals.append([int.from_bytes(data[k + 2 : k + 4], "little") for k in range(0, len(data) - 1, 3)])
            self.back_s = self.clock.now_s + self.out_s if len(self.goals) == self.takes else 0.0
        elif instruction == Instruction.WRITE and servo_id not in self.silent:
            self.torque[servo_id] = data[0]
        value = self.goals[-1][servo_id - 1].to_bytes(2, "little") if is_goal and servo_id < 7 else b"\x01"
        answer = encode_packet(servo_id, 0, value if instruction == Instruction.READ else b"")
        self.reply = b"" if servo_id in self.silent else answer


class Line(Port):
    """A port with `Servos` in place of a wire."""

    def __init__(self, servos: Servos, reach: Reach) -> None:
        servos.check()
        self._servos, self._reach, self._fd = servos, reach, os.open("/dev/null", os.O_RDWR)

    def _write(self, packet: bytes) -> None:
        self._servos.take(packet)

    def _receive(self, length: int) -> bytes:
        self._servos.clock.wait(0.0 if self._servos.reply else REPLY_S)
        return self._servos.reply[:length]


class TestAct:
    """What the guardian does to a line, in simulated time."""

    CONFIG = GuardianConfig("port", 1_000_000, "", 1, 0.005, 40, "park", (1, 2, 3, 4, 5, 6), (3000,) * 6, 100.0)

    @pytest.fixture
    def servos(self, monkeypatch: pytest.MonkeyPatch) -> Servos:
        line = Servos(Clock(monkeypatch))
        monkeypatch.setattr(guardian, "Port", lambda _path, _baud_rate, reach: Line(line, reach))
        return line

    def test_parks_and_lets_go(self, servos: Servos):
        assert act(self.CONFIG, "park") == {"did": "park"}
        assert servos.goals[-1] == [3000] * 6
        assert set(servos.torque.values()) == {0}

    def test_a_cable_that_is_pulled_after_a_long_way_is_waited_for(self, servos: Servos):
        """More than ten seconds on the way do not count as time in which the arm was out of reach."""
        servos.takes, servos.out_s = 800, 9.0
        assert act(self.CONFIG, "park") == {"did": "park"}
        assert servos.clock.now_s > 125.0
        assert set(servos.torque.values()) == {0}

    def test_an_arm_that_is_lost_on_the_way_is_told_as_that(self, servos: Servos):
        servos.takes, servos.out_s = 300, 60.0
        assert act(self.CONFIG, "park") == {"did": "part", "why": "the port is gone"}

    def test_an_arm_that_never_was_there_is_given_up_in_time(self, servos: Servos):
        servos.back_s = 1e9
        assert act(self.CONFIG, "relax") == {"did": "nothing", "why": "the port is gone"}
        assert servos.clock.now_s == pytest.approx(110.0, abs=0.1)

    def test_a_servo_that_is_silent_keeps_no_other_on_and_nobody_waiting(self, servos: Servos):
        servos.silent = {2}
        assert act(self.CONFIG, "relax") == {"did": "part", "why": "servo 2 does not answer"}
        assert [servos.torque[k] for k in (1, 3, 4, 5, 6)] == [0] * 5
        assert servos.clock.now_s == pytest.approx(110.0, abs=1.0)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"park_steps": ()},
            {"park_steps": (3000,) * 5},
            {"park_steps": (3000,) * 5 + (4096,)},
            {"park_steps": (3000,) * 5 + (-1,)},
            {"park_steps_s": 0.0},
            {"park_steps_s": -1.0},
            {"park_steps_s": math.nan},
            {"park_steps_s": math.inf},
        ],
    )
    def test_a_way_that_is_none_leaves_the_arm_holding(self, wrong: dict[str, Any], servos: Servos):
        told = act(replace(self.CONFIG, **wrong), "park")
        assert told["did"] == "hold"
        assert "correct park_q and park_speed_rad_s" in told["why"]
        assert len(servos.goals) == 1, "none was sent"
        assert set(servos.torque.values()) == {1}


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


class TestGuard:
    """The runtime's end, with a guardian that has nothing to do."""

    BUS: Any = SimpleNamespace(port="/nowhere", servos=tuple(JointCalibration(k) for k in range(1, 7)))

    def test_a_guardian_that_is_stopped_is_none(self):
        with Guard(load_robot("so101-twin"), self.BUS) as guard:
            for _ in range(2 * MOST_IDLE_LOOKS):
                assert guard.is_watching()
                time.sleep(0.03)
            os.kill(guard.pid, signal.SIGSTOP)
            time.sleep(0.05)
            seen = [guard.is_watching() for _ in range(MOST_IDLE_LOOKS + 1)]
            os.kill(guard.pid, signal.SIGCONT)
            time.sleep(0.1)
            assert (seen[0], seen[-1], guard.is_watching()) == (True, False, True)

    def test_a_rate_that_only_the_runtime_can_set_is_refused(self):
        robot = load_robot("so101-twin")
        robot = replace(robot, config=replace(robot.config, baud_rate=250_000))
        with pytest.raises(GuardianFailed, match="choose 500000 or 1000000"):
            Guard(robot, self.BUS)


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
    if sys.argv[3]:
        guard.set_limp()
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

    def __init__(
        self, twin: RunningTwin, on_exit: str, ticks: int = 100_000, beats: int = 40, *, is_limp: bool = False
    ) -> None:
        config = replace(
            load_robot("so101-twin").config, port=twin.port, on_exit=on_exit, loop_rate_hz=100.0, missed_beats=beats
        )
        command = [sys.executable, "-c", VICTIM, json.dumps(as_json(config)), str(ticks), "limp" * is_limp]
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

    def test_an_arm_that_cannot_hold_is_let_go_whatever_its_file_says(self, twin: RunningTwin):
        victim, since_ns = Victim(twin, "hold", is_limp=True), time.monotonic_ns()
        victim.process.kill()
        assert victim.rest()[0]["did"] == "relax"
        assert let_go(twin, since_ns)

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
