"""What the loop is told when actuators behind a mailbox raise."""

import time

import numpy as np
import pytest

from onbeat.drivers.feetech.errors import GoalRefused, NoReply, PortLost, ServoOverheat, ServoOverload
from onbeat.drivers.feetech.fake import FakeBus
from onbeat.drivers.feetech.protocol import GOAL_REFUSED, NO_REPLY, OK, PORT_LOST, SERVO_FAULT
from onbeat.drivers.feetech.tables import Status
from onbeat.drivers.interfaces import JointState
from onbeat.runtime.link import ActuatorServer, exchange, mailbox_link
from onbeat.runtime.mailbox import STALE_NS, put_answer

pytestmark = pytest.mark.alone


class Failing(FakeBus):
    """A bus whose every read raises `always`, once that is set."""

    always: Exception | None = None

    def read(self, into: JointState) -> None:
        self.fault = self.always
        super().read(into)


@pytest.mark.parametrize(
    ("fault", "outcome", "status"),
    [
        (ServoOverload("servo 1 reports OVERLOAD"), SERVO_FAULT, Status.OVERLOAD),
        (ServoOverheat("servo 1 reports TEMPERATURE"), SERVO_FAULT, Status.TEMPERATURE),
        (GoalRefused("the goal of a"), GOAL_REFUSED, 0),
        (NoReply("servo 1 did not reply"), NO_REPLY, 0),
        (PortLost("the port is gone"), PORT_LOST, 0),
        (ZeroDivisionError("in the SDK"), PORT_LOST, 0),
    ],
)
def test_a_fault_is_what_it_is_on_a_bus(fault: Exception, outcome: int, status: int) -> None:
    bus, goal = Failing(("a", "b")), np.zeros(2)
    with ActuatorServer(bus) as server:
        bus.always = fault
        exchange(server.link, goal, time.monotonic_ns())
        while server.link.box.answer_count[0] < 2:
            time.sleep(0.001)
        assert exchange(server.link, goal, time.monotonic_ns()) == outcome
        assert server.link.wire.status.max() == status
        assert server.error_of(outcome) is fault


@pytest.mark.parametrize("outcome", [OK, SERVO_FAULT])
def test_an_old_answer_is_none_whatever_it_was(outcome: int) -> None:
    link, zeros = mailbox_link(2), np.zeros(2)
    put_answer(link.box, 0, outcome, zeros, zeros, zeros)
    assert exchange(link, zeros, STALE_NS) == outcome
    assert exchange(link, zeros, STALE_NS + 1) == NO_REPLY
