"""The runtime's end of the guardian: start it before there is torque, tell it what is to be guarded, let it go."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import onbeat
from onbeat.drivers.feetech.device import FeetechBus
from onbeat.drivers.feetech.packets import RAD_PER_STEP, steps_of_rad
from onbeat.drivers.interfaces import Actuators, JointState
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.guardian import PARK_PERIOD_S, GuardianConfig, parking_way
from onbeat.runtime.heartbeat import DONE, GUARDED, IDLE, WORDS, Heartbeat
from onbeat.runtime.robots import HOLD, PARK, Robot

READY_S = 10.0
POLL_S = 0.002


class GuardianFailed(OnbeatError):
    """The guardian did not start: nothing may move without."""


class Guard:
    """A guardian for the length of a `with` block.

    `words` (WORDS,) int64 is the shared memory, whose first words the loop writes as its progress. `arm` before torque
    goes on; `release` once the arm was ended as the robot file says. A block that is left without `release` while
    armed leaves the guardian behind, which acts as soon as this process is gone.
    """

    def __init__(self, robot: Robot, bus: FeetechBus) -> None:
        self._heartbeat = Heartbeat.create()
        self.words: NDArray[np.int64] = np.frombuffer(self._heartbeat.words, np.int64, WORDS)
        self._config = guardian_config(robot, bus, self._heartbeat.path)
        self._process: subprocess.Popen[bytes] | None = None
        self.phase = IDLE

    def __enter__(self) -> "Guard":
        """Start it and wait until it watches. Raises GuardianFailed."""
        self._process = start_guardian(self._config)
        deadline_s = time.monotonic() + READY_S
        while not self._heartbeat.is_watched:
            if not self.is_alive or time.monotonic() > deadline_s:
                self.release()
                raise GuardianFailed("the guardian did not start, and nothing moves without: read the daemon's log")
            time.sleep(POLL_S)
        return self

    def __exit__(self, *_: object) -> None:
        if self.phase != GUARDED:
            self.release()

    @property
    def is_alive(self) -> bool:
        """Whether there is still somebody who would act."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the guardian's process."""
        assert self._process is not None, "not started"
        return self._process.pid

    def arm(self) -> None:
        """From now on the guardian acts when this process dies, and when the loop's progress stops."""
        self._set(GUARDED)

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


def end_arm(bus: Actuators, robot: Robot, on_exit: str) -> None:
    """Bring an arm that rests to the end that its file says. Raises BusError."""
    if on_exit == PARK:
        _park(bus, robot)
    if on_exit != HOLD:
        bus.enable(False)


def _park(bus: Actuators, robot: Robot) -> None:
    """The guardian's way, from where the arm is."""
    joints = len(robot.joints)
    state = JointState(0, np.zeros(joints), np.zeros(joints), np.zeros(joints))
    bus.read(state)
    start, end = ([round(q / RAD_PER_STEP) for q in pose] for pose in (state.position_rad, robot.config.park_q))
    for steps in parking_way(start, end, robot.config.park_speed_rad_s / RAD_PER_STEP):
        bus.write(np.array(steps) * RAD_PER_STEP)
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
