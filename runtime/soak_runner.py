"""Runs a soak's legs in processes of their own, makes the faults that come from outside, and keeps what is told."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onbeat.drivers.twin.client import RunningTwin
from onbeat.drivers.twin.inject import Injection, inject
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.soak_schedule import PAUSE_S, Due
from onbeat.runtime.soak_session import Leg

LEG_END_S = 30.0
COMPILE_S = 600.0  # before the first tick, where nothing was compiled yet
OVER_S = 0.2  # for the twin to take note
SAMPLE_S = 0.5


class SoakFailed(OnbeatError):
    """A soak could not be carried out."""


@dataclass(slots=True)
class Told:
    """What a leg told: the events of the runtime and of its guardian, and the memory of its process, MB.

    dues: what was made in it.
    """

    leg: Leg
    dues: Sequence[Due] = ()
    ended: dict[str, Any] = field(default_factory=dict)
    guardian: dict[str, Any] = field(default_factory=dict)
    memory_mb: list[float] = field(default_factory=list)
    from_ns: int = 0
    until_ns: int = 0
    moving_ns: int = 0

    @property
    def ended_by(self) -> str | None:
        """The name of a fault: as the runtime says, or its guardian where there was no runtime left to say it."""
        return self.ended.get("ended_by") if self.ended else self.guardian.get("fault")


class Worker:
    """A process that runs legs, one after the other. events: what it and its guardians say, None behind the last."""

    def __init__(self, log: Path) -> None:
        with log.open("a") as errors:
            command = [sys.executable, "-m", "onbeat.runtime.soak_session"]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._follow, daemon=True).start()

    def send(self, leg: Leg) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(leg)) + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(LEG_END_S)
        except subprocess.TimeoutExpired:  # a spare that is still compiling
            self.process.kill()
            self.process.wait()

    def _follow(self) -> None:
        """Until nobody is there any more who could say something."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.put(json.loads(line))
        self.process.wait()
        self.events.put(None)


class Runner:
    """Runs legs in a worker; in another one whenever the last is gone. A context manager."""

    def __init__(self, twin: RunningTwin, log: Path) -> None:
        self._twin, self._log = twin, log
        self._worker: Worker | None = None
        self._spare: Worker | None = None
        self._acts: list[threading.Timer] = []

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (self._worker, self._spare):
            if worker is not None:
                worker.close()

    def keep_spare(self) -> None:
        """Have another worker get ready meanwhile, for legs that their process does not survive."""
        if self._spare is None:
            self._spare = Worker(self._log)

    def run(self, leg: Leg, dues: Sequence[Due]) -> Told:
        """One leg, with what its schedule wants of the wire and of the process, to its very end. Raises SoakFailed."""
        if self._worker is None:
            self._worker, self._spare = self._spare or Worker(self._log), None
        told = Told(leg, dues, from_ns=time.monotonic_ns())
        self._worker.send(leg)
        while self._take(told, self._worker, dues):
            since_s = (time.monotonic_ns() - (told.moving_ns or told.from_ns)) * 1e-9
            if since_s > leg.seconds + (LEG_END_S if told.moving_ns else COMPILE_S):
                self._worker.process.kill()
                raise SoakFailed(f"leg {leg.name} did not end: read {self._log}")
        for act in self._acts:
            act.cancel()
        told.until_ns = time.monotonic_ns()
        wait_until_over(dues, told.moving_ns)
        return told

    def _take(self, told: Told, worker: Worker, dues: Sequence[Due]) -> bool:
        """Wait for the next thing that a leg tells; False when it was the last."""
        try:
            event = worker.events.get(timeout=SAMPLE_S)
        except queue.Empty:
            told.memory_mb.append(memory_mb(worker.process.pid))
            return True
        if event is None:
            self._worker = None
            return False
        if event["event"] == "moving":
            told.memory_mb.clear()
            told.moving_ns = event["t_ns"]
            self._make_faults(dues, event["t_ns"], worker.process.pid, event["guardian_pid"])
        elif event["event"] == "guardian":
            told.guardian = event
        elif event["event"] == "ended":
            told.ended = event
            return event["is_left_to_guardian"]
        return True

    def _make_faults(self, dues: Sequence[Due], start_ns: int, pid: int, guardian_pid: int) -> None:
        for due in dues:
            at_ns = start_ns + round(due.at_s * 1e9)
            if due.kind.where == "wire":
                until_ns = at_ns + round(due.kind.lasts_s * 1e9)
                inject(self._twin.run_dir, Injection(due.kind.kind, at_ns, until_ns, due.joint))
            elif due.kind.where == "process":
                wait_s = max(0.0, (at_ns - time.monotonic_ns()) * 1e-9)
                act = threading.Timer(wait_s, PROCESS_ACTS[due.kind.kind], (pid, guardian_pid))
                act.daemon = True
                act.start()
                self._acts.append(act)


def wait_until_over(dues: Sequence[Due], moving_ns: int) -> None:
    """Until no fault of a leg is shown any more: a session does not start on servos that report one."""
    over_s = max((due.at_s + due.kind.lasts_s for due in dues if due.kind.where == "wire"), default=0.0) + OVER_S
    time.sleep(max(0.0, moving_ns * 1e-9 + over_s - time.monotonic()))


def pause(pid: int, _: int) -> None:
    """Stop a process for a moment; at real-time priority where allowed, or the moment gets long on a busy machine."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    with suppress(ProcessLookupError):  # of a leg that ended early
        os.kill(pid, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        os.kill(pid, signal.SIGCONT)


PROCESS_ACTS = {
    "pause": pause,
    "terminate": lambda pid, _: os.kill(pid, signal.SIGTERM),
    "kill": lambda pid, _: os.kill(pid, signal.SIGKILL),
    "hang": lambda pid, _: os.kill(pid, signal.SIGSTOP),
    "kill_guardian": lambda _, guardian_pid: os.kill(guardian_pid, signal.SIGKILL),
}


def memory_mb(pid: int) -> float:
    """What a process has allocated, resident or swapped out; 0 when it is gone.

    Pages of files are left out: the kernel takes them away and brings them back as it likes.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(kb) for kb in re.findall(r"^(?:RssAnon|VmSwap):\s*(\d+) kB", status, re.MULTILINE)) / 1024
