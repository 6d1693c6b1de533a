"""The bus without a wire behaves as the runtime's contract says."""

import numpy as np
import pytest

from onbeat.drivers.feetech.errors import GoalRefused, NoReply, ServoOverload
from onbeat.drivers.feetech.fake import FakeBus
from onbeat.drivers.interfaces import Actuators, JointState


@pytest.fixture
def pair() -> JointState:
    return JointState(0, np.zeros(2), np.zeros(2), np.zeros(2))


def test_joints_follow_step_by_step(pair: JointState) -> None:
    bus = FakeBus(("a", "b"), step_rad=0.1, clock=lambda: 42)
    bus.enable(True)
    bus.write(np.array([0.25, -0.05]))
    seen = []
    for _ in range(3):
        bus.read(pair)
        seen.append(pair.position_rad.copy())
    np.testing.assert_allclose(seen, [[0.1, -0.05], [0.2, -0.05], [0.25, -0.05]])
    assert pair.t_ns == 42


def test_without_torque_nothing_moves(pair: JointState) -> None:
    bus = FakeBus(("a", "b"))
    bus.exchange(np.array([1.0, 1.0]), pair)
    assert not pair.position_rad.any()


def test_torque_on_holds(pair: JointState) -> None:
    bus = FakeBus(("a", "b"))
    bus.write(np.array([1.0, 1.0]))
    bus.enable(True)
    bus.read(pair)
    assert not pair.position_rad.any()


@pytest.mark.parametrize("goal", [np.nan, np.inf, 3.2])
def test_bad_goals_are_refused(goal: float) -> None:
    bus = FakeBus(("a", "b"))
    with pytest.raises(GoalRefused, match="b is not"):
        bus.write(np.array([0.0, goal]))
    assert bus.goals == []


def test_a_fault_is_raised_once(pair: JointState) -> None:
    bus: FakeBus = FakeBus(("a", "b"))
    bus.fault = NoReply("servo 1 did not reply")
    with pytest.raises(NoReply):
        bus.read(pair)
    bus.read(pair)
    assert bus.faults() == {"ok": 1}


def test_a_fault_of_a_servo_comes_with_its_state(pair: JointState) -> None:
    bus = FakeBus(("a", "b"), step_rad=0.1, clock=lambda: 42)
    bus.enable(True)
    bus.fault = ServoOverload("servo 1 reports OVERLOAD")
    bus.write(np.array([0.1, 0.0]))
    with pytest.raises(ServoOverload):
        bus.read(pair)
    assert (pair.t_ns, pair.position_rad[0]) == (42, 0.1)
    bus.read(pair)


def test_is_actuators_and_closes() -> None:
    with FakeBus(("a", "b")) as bus:
        actuators: Actuators = bus
        assert actuators.joints == ("a", "b")
    assert not bus.is_open
    bus.close()
