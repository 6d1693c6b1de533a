"""The far end of a servo bus on a pty, served by a thread, with a hook that spoils its answers."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from onbeat.drivers.feetech.device import BusSettings, JointCalibration
from onbeat.drivers.interfaces import JointState
from onbeat.drivers.twin.line import ServoLine
from onbeat.drivers.twin.servos import Answer, ServoBank

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")


class FarServos:
    """Six servos at rest on a pty. `spoil` holds what is done to the next answers, one each."""

    def __init__(self, ids: range = range(1, 7)) -> None:
        self.bank = ServoBank(ids)
        self.bank.sense(np.linspace(-1.0, 1.0, len(ids)), np.zeros(len(ids)), np.zeros(len(ids)), 0)
        self.spoil: deque[Callable[[Answer], Answer]] = deque()
        self.line = ServoLine(self)
        self.port = self.line.port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def feed(self, data: bytes, now_ns: int = 0) -> Answer:
        answer = self.bank.feed(data, now_ns)
        return self.spoil.popleft()(answer) if answer.data and self.spoil else answer

    def unplug(self) -> None:
        self._stop.set()
        self._thread.join()
        self.line.close()

    def _serve(self) -> None:
        while not self._stop.is_set():
            self.line.serve_until(time.monotonic_ns() + 5_000_000)


@pytest.fixture
def far() -> Iterator[FarServos]:
    servos = FarServos()
    yield servos
    servos.unplug()


@pytest.fixture
def joints() -> dict[str, JointCalibration]:
    return {name: JointCalibration(servo_id) for servo_id, name in enumerate(JOINTS, start=1)}


@pytest.fixture
def state() -> JointState:
    return JointState(0, np.zeros(6), np.zeros(6), np.zeros(6))


@pytest.fixture
def once() -> BusSettings:
    """No retries, so that each fault shows; a time-out that a busy machine keeps."""
    return BusSettings(timeout_ms=200.0, settle_ms=5.0, retries=0)
