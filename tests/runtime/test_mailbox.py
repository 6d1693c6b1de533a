"""Boxes that threads share: empty ones, ones that are overtaken while they are read, and goals and answers across."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from onbeat.drivers.feetech.exchange import Wire
from onbeat.drivers.feetech.fake import FakeBus
from onbeat.drivers.feetech.protocol import GOAL_REFUSED, NO_REPLY, OK, PORT_LOST
from onbeat.kernels.arrays import fill_values
from onbeat.kernels.compiled import compiled
from onbeat.runtime.link import ActuatorServer, mailbox_link
from onbeat.runtime.mailbox import (
    ANSWERS,
    STALE_NS,
    ActuatorBox,
    StateHistory,
    append_state,
    exchange_mailbox,
    put_answer,
    take_goal,
)
from onbeat.runtime.realtime import prepare_loop

GOAL = np.array([0.5, -0.5])


@pytest.fixture
def wire() -> Wire:
    return mailbox_link(2).wire


@pytest.fixture
def box() -> ActuatorBox:
    return mailbox_link(2).box


def answer(box: ActuatorBox, value: float, outcome: int = OK, t_ns: int = 100) -> None:
    put_answer(box, t_ns, outcome, np.full(2, value), np.full(2, value), np.full(2, value))


class TestActuatorBox:
    def test_no_answer_yet_is_no_reply(self, box: ActuatorBox, wire: Wire):
        assert exchange_mailbox(box, wire, GOAL, 100) == NO_REPLY

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_goal_that_is_no_number_is_refused(self, box: ActuatorBox, wire: Wire, bad: float):
        answer(box, 1.0)
        assert exchange_mailbox(box, wire, np.array([0.0, bad]), 100) == GOAL_REFUSED
        assert box.goal_word[0] == 0

    def test_an_old_answer_is_none(self, box: ActuatorBox, wire: Wire):
        answer(box, 1.0)
        assert exchange_mailbox(box, wire, GOAL, 100 + STALE_NS) == OK
        assert exchange_mailbox(box, wire, GOAL, 101 + STALE_NS) == NO_REPLY

    def test_a_fault_is_passed_on(self, box: ActuatorBox, wire: Wire):
        answer(box, 1.0, PORT_LOST)
        assert exchange_mailbox(box, wire, GOAL, 100) == PORT_LOST

    def test_goal_and_answer_come_across(self, box: ActuatorBox, wire: Wire):
        for value in range(ANSWERS + 2):
            answer(box, float(value), t_ns=value)
        assert exchange_mailbox(box, wire, GOAL, 100) == OK
        assert (wire.t_ns[0], wire.position_rad.tolist(), wire.load.tolist()) == (5, [5.0, 5.0], [5.0, 5.0])
        taken = np.zeros(2)
        assert take_goal(box, taken)
        assert taken.tolist() == GOAL.tolist()

    def test_neither_side_ever_sees_half(self, box: ActuatorBox, wire: Wire):
        """The far end answers with its goal, in all places the same number, while the loop sends the next ones."""
        stop = np.zeros(1, np.int64)
        far_end = threading.Thread(target=echo, args=(box, stop, np.zeros(2)))
        far_end.start()
        torn, fresh = exchange_many(box, wire, np.zeros(2), 50_000)
        stop[0] = 1
        far_end.join()
        assert torn == 0
        assert fresh > 0


@compiled
def echo(box, stop, goal):
    while stop[0] == 0:
        if take_goal(box, goal):
            put_answer(box, 0, OK, goal, goal, goal)


@compiled
def exchange_many(box, wire, goal, count):
    """(answers that were not one number, answers that brought another number)."""
    torn, fresh, last = 0, 0, -1.0
    for k in range(count):
        fill_values(goal, k)
        if exchange_mailbox(box, wire, goal, 0) == OK:
            first = wire.position_rad[0]
            torn += 1 if wire.position_rad[1] != first or wire.load[0] != first or wire.load[1] != first else 0
            fresh += 1 if first != last else 0
            last = first
    return torn, fresh


class Noting(FakeBus):
    """Notes where the thread that serves it may run, and how."""

    served: tuple[set[int], int] | None = None

    def write(self, goal_rad: NDArray[np.float64]) -> None:
        self.goals.append(goal_rad)
        self.served = os.sched_getaffinity(0), os.sched_getscheduler(0)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor is all there is")
def test_actuators_are_not_kept_on_the_processor_of_the_loop_that_serves_them():
    actuators = Noting(("pan", "grip"))

    def work() -> None:
        prepare_loop()
        with ActuatorServer(actuators) as server:
            exchange_mailbox(server.link.box, server.link.wire, GOAL, time.monotonic_ns())
            while actuators.served is None:
                time.sleep(0.001)

    with ThreadPoolExecutor(1) as threads:
        threads.submit(work).result()
    assert actuators.served == (os.sched_getaffinity(os.getpid()), os.SCHED_OTHER)


class TestStateHistory:
    def test_is_empty_before_the_first_state(self):
        assert StateHistory(2).at(0) is None

    def test_gives_the_joints_at_a_time(self):
        history = StateHistory(2, capacity=8)
        for k in range(20):
            history.append(10**15 + k * 100, np.array([k, -k], float))
        np.testing.assert_allclose(history.at(10**15 + 1750), [17.5, -17.5], rtol=0, atol=1e-9)

    def test_gives_the_nearest_outside_what_it_holds(self):
        history = StateHistory(1, capacity=8)
        for k in range(20):
            history.append(k, np.array([k], float))
        newest, oldest = history.at(1000), history.at(0)
        assert newest is not None
        assert oldest is not None
        assert newest.tolist() == [19.0]
        assert 12 <= oldest[0] <= 14

    def test_a_reader_never_sees_a_state_that_is_being_overwritten(self):
        """Every state has its time in all places, so that whatever is asked for, all joints agree."""
        history = StateHistory(4, capacity=256)
        writer = threading.Thread(target=append_many, args=(history.ring, np.zeros(4), 1_000_000))
        history.append(0, np.zeros(4))
        writer.start()
        answers = []
        while writer.is_alive():
            answers.append(history.at(10**9))
        writer.join()
        seen = np.array(answers)
        assert (seen == seen[:, :1]).all()
        assert (np.diff(seen[:, 0]) >= 0).all()
        assert len(np.unique(seen[:, 0])) > 1


@compiled
def append_many(ring, state, count):
    for k in range(1, count + 1):
        fill_values(state, k)
        append_state(ring, k, state)


def test_a_history_is_asked_while_time_goes_on():
    history = StateHistory(1)
    now_ns = time.monotonic_ns()
    history.append(now_ns, np.array([1.0]))
    history.append(now_ns + 1000, np.array([2.0]))
    middle = history.at(now_ns + 500)
    assert middle is not None
    assert middle[0] == pytest.approx(1.5, abs=0.01)
