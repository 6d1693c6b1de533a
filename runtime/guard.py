"""The runtime's end of the guardian: start it before there is torque, tell it what is to be guarded, let it go."""

import json
import os
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import onbeat
from onbeat.drivers.feetech.device import FeetechBus
from onbeat.drivers.feetech.packets import RAD_PER_STEP, steps_of_rad
from onbeat.drivers.interfaces import Actuators
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.guardian import PARK_PERIOD_S, GuardianConfig, parking_way
from onbeat.runtime.heartbeat import DONE, GUARDED, IDLE, WORDS, Heartbeat
from onbeat.runtime.robots import HOLD, PARK, Robot

READY_S = 10.0
POLL_S = 0.002
MOST_IDLE_LOOKS = 10  # of the status thread, 5 Hz, with none of the guardian's in between, which are every 5 ms


class GuardianFailed(OnbeatError):
    """The guardian did not start: nothing may move without."""


class Guard:
    """A guardian for the length of a `with` block.

    `words` (WORDS,) int64 is the shared memory, whose first words the loop writes as its progress. `arm` before torque
    goes on; `release` once the arm was ended as the robot file says, `count_way` on a long way to there. A block that
    is left without `release` while armed leaves the guardian behind, which acts as soon as this process is gone, or has
    stood still for too long.
    """

    def __init__(self, robot: Robot, bus: FeetechBus) -> None:
        """Raises GuardianFailed for a rate that the standard library cannot set a port to."""
        if not hasattr(termios, f"B{robot.config.baud_rate}"):
            raise GuardianFailed(f"the guardian cannot set {robot.config.baud_rate} baud: choose 500000 or 1000000")
        self._heartbeat = Heartbeat.create()
        self.words: NDArray[np.int64] = np.frombuffer(self._heartbeat.words, np.int64, WORDS)
        self._config = guardian_config(robot, bus, self._heartbeat.path)
        self._process: subprocess.Popen[bytes] | None = None
        self.phase = IDLE
        self._looks, self._idle_looks = 0, 0

    def __enter__(self) -> "Guard":
        """Start it and wait until it watches. Raises GuardianFailed."""
        self._process = start_guardian(self._config)
        deadline_s = time.monotonic() + READY_S
        while self._heartbeat.looks == 0:
            if not self._is_running or time.monotonic() > deadline_s:
                self.release()
                raise GuardianFailed("the guardian did not start, and nothing moves without: read the daemon's log")
            time.sleep(POLL_S)
        return self

    def __exit__(self, *_: object) -> None:
        if self.phase != GUARDED:
            self.release()

    def is_watching(self) -> bool:
        """Whether there is still somebody who would act: to be asked steadily, by one thread.

        A process that is there and has not looked for so long is stopped, or stuck.
        """
        looks = self._heartbeat.looks
        self._idle_looks = 0 if looks != self._looks else self._idle_looks + 1
        self._looks = looks
        return self._is_running and self._idle_looks < MOST_IDLE_LOOKS

    @property
    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the guardian's process."""
        assert self._process is not None, "not started"
        return self._process.pid

    def arm(self) -> None:
        """From now on the guardian acts when this process dies, and when the loop's progress stops."""
        self._set(GUARDED)

    def count_way(self) -> None:
        """The arm is on its way to its parking pose: one goal further."""
        self._heartbeat.count_way()

    def set_limp(self) -> None:
        """Should the guardian have to act, it takes torque off."""
        self._heartbeat.set_limp()

    def release(self) -> None:
        """Nothing is left to guard: the guardian ends."""
        self._set(DONE)
        if self._process is not None:
            try:
                self._process.wait(READY_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._heartbeat.unlink()

    def _set(self, phase: int) -> None:
        self.phase = phase
        self._heartbeat.set_phase(phase)


def guardian_config(robot: Robot, bus: FeetechBus, heartbeat: Path) -> GuardianConfig:
    """What the guardian of this robot is told; angles become steps here."""
    config, servos = robot.config, bus.servos
    park_q = config.park_q if config.on_exit == PARK else ()
    return GuardianConfig(
        port=bus.port,
        baud_rate=config.baud_rate,
        heartbeat=str(heartbeat),
        runtime_pid=os.getpid(),
        period_s=1.0 / config.loop_rate_hz,
        missed_beats=config.missed_beats,
        on_exit=config.on_exit,
        servo_ids=tuple(servo.servo_id for servo in servos),
        park_steps=tuple(
            steps_of_rad(q, servo.zero_steps, servo.direction) for q, servo in zip(park_q, servos, strict=bool(park_q))
        ),
        park_steps_s=config.park_speed_rad_s / RAD_PER_STEP,
    )


def end_arm(
    bus: Actuators, robot: Robot, on_exit: str, *, start_q: NDArray[np.float64], on_way: Callable[[], None]
) -> None:
    """Bring an arm that rests to the end that its file says. Raises BusError, and ValueError for a way that is none.

    start_q: (J,) rad, the last goals, which a servo that holds something is not at. on_way: called after every goal.
    """
    if on_exit == PARK:
        _park(bus, robot, start_q, on_way)
    if on_exit != HOLD:
        bus.enable(False)


def _park(bus: Actuators, robot: Robot, start_q: NDArray[np.float64], on_way: Callable[[], None]) -> None:
    """The guardian's way. What the servos report on it changes nothing: torque goes at its end."""
    start, end = ([round(q / RAD_PER_STEP) for q in pose] for pose in (start_q, robot.config.park_q))
    for steps in parking_way(start, end, robot.config.park_speed_rad_s / RAD_PER_STEP):
        bus.write(np.array(steps) * RAD_PER_STEP)
        on_way()
        time.sleep(PARK_PERIOD_S)


def start_guardian(config: GuardianConfig) -> "subprocess.Popen[bytes]":
    """Start it, in a session of its own. What it says goes where this process's own lines go."""
    root = str(Path(onbeat.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "onbeat.runtime.guardian", json.dumps(asdict(config))],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
