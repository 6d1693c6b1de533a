"""The loop under a clock that tests move: deadlines, faults, and how it ends."""

import threading

import numpy as np
import pytest

from onbeat.drivers.feetech.errors import NoReply, PortLost, ServoOverload
from onbeat.drivers.feetech.fake import FakeBus
from onbeat.runtime.loop import MAX_FAULTY_TICKS, ControlLoop, LoopFault, StateHistory, prepare_real_time, wait_until
from onbeat.runtime.record import TickLog
from onbeat.runtime.tick import JointLimits, new_tick_state
from onbeat.runtime.timeline import publish

JOINTS = ("pan", "grip")
PERIOD_NS = 10_000_000
LIMITS = JointLimits(*(np.full(2, bound) for bound in (-1.0, 1.0, 2.0, 20.0)))


class Rig:
    """A loop on a fake bus. Its time is `now_ns`; a tick in `stalls` takes that long; it is stopped after `ticks`."""

    def __init__(self, ticks: int, stalls: dict[int, int] | None = None) -> None:
        self.now_ns, self.ticks, self.stalls = 0, ticks, stalls or {}
        self.stop = threading.Event()
        self.bus = FakeBus(JOINTS, clock=lambda: self.now_ns)
        self.bus.position_rad[:] = [0.2, -0.1]
        self.bus.enable(True)
        self.log = TickLog(1000, len(JOINTS))
        self.history = StateHistory(len(JOINTS))
        self.state = new_tick_state(LIMITS, rate_hz=100, rows=16)
        self.loop = ControlLoop(
            self.state, self.bus, log=self.log, history=self.history, clock=self.clock, wait=self.wait
        )

    def clock(self) -> int:
        return self.now_ns

    def wait(self, due_ns: int) -> None:
        tick = self.loop.status.ticks
        self.now_ns = max(self.now_ns, due_ns) + self.stalls.get(tick, 0)
        if tick == self.ticks:
            self.stop.set()

    def run(self) -> None:
        self.loop.read_first()
        self.loop.run(self.stop)


class TestFaults:
    def test_one_lost_exchange_is_counted_and_survived(self):
        rig = Rig(20)
        wait = rig.wait

        def wait_with_fault(due_ns: int) -> None:
            wait(due_ns)
            rig.bus.fault = NoReply("servo 1 did not reply") if rig.loop.status.ticks == 7 else None

        rig.loop._wait = wait_with_fault
        rig.run()
        assert rig.loop.status.faulty_ticks == 1
        assert rig.loop.status.ticks >= 20

    def test_a_dead_bus_stops_the_loop_and_says_why(self):
        rig = Rig(20)
        rig.loop.read_first()
        rig.bus.exchange = broken(NoReply("servo 3 did not reply"))
        with pytest.raises(LoopFault, match=r"ticks in a row: servo 3 did not reply.*check its cable"):
            rig.loop.run(rig.stop)
        assert rig.loop.status.faulty_ticks == MAX_FAULTY_TICKS

    def test_a_servo_that_protects_itself_is_named(self):
        rig = Rig(20)
        rig.loop.read_first()
        rig.bus.exchange = broken(ServoOverload("servo 4 (wrist_flex) reports OVERLOAD"))
        with pytest.raises(LoopFault, match=r"protects itself.*wrist_flex.*free the joint"):
            rig.loop.run(rig.stop)

    def test_a_pulled_cable_stops_it_at_once(self):
        rig = Rig(20)
        rig.loop.read_first()
        rig.bus.exchange = broken(PortLost("the port is gone"))
        with pytest.raises(PortLost):
            rig.loop.run(rig.stop)
        assert rig.loop.status.ticks == 0

    def test_more_ticks_than_there_is_room_for_are_counted(self):
        rig = Rig(20)
        rig.log = rig.loop._log = TickLog(5, 2)
        rig.run()
        assert rig.log.count == 5
        assert rig.log.dropped == rig.loop.status.ticks - 5


def broken(fault: Exception):
    def exchange(*_: object) -> None:
        raise fault

    return exchange


class TestDeadlines:
    def test_are_absolute(self):
        rig = Rig(50, stalls={10: 3_000_000})
        rig.run()
        due = rig.log.arrays()["due_ns"]
        assert (np.diff(due) == PERIOD_NS).all()
        assert rig.loop.status.missed == 0
        lateness = rig.log.arrays()["start_ns"] - due
        assert lateness[10] == 3_000_000
        assert lateness[11] == 0

    def test_missed_ones_are_counted_and_never_made_up_for(self):
        rig = Rig(50, stalls={10: 37_000_000})
        rig.run()
        due = rig.log.arrays()["due_ns"]
        assert rig.loop.status.missed == 2
        assert np.diff(due)[10] == 3 * PERIOD_NS
        assert (np.delete(np.diff(due), 10) == PERIOD_NS).all()

    def test_a_missed_tick_does_not_make_the_arm_jump(self):
        rig = Rig(60, stalls={20: 95_000_000})
        publish(rig.state.timeline, np.full((16, 2), 0.9), t0_ns=0, period_ns=100_000_000, now_ns=0)
        rig.run()
        goals = rig.log.arrays()["goal_rad"]
        assert np.abs(np.diff(goals, axis=0)).max() <= 2.0 * 0.01 * (1 + 1e-9)

    def test_waiting_never_returns_early(self):
        import time

        for _ in range(20):
            due_ns = time.monotonic_ns() + 700_000
            wait_until(due_ns)
            assert time.monotonic_ns() >= due_ns


class TestStop:
    def test_a_moving_arm_is_brought_to_rest_within_its_limits(self):
        rig = Rig(15)
        publish(rig.state.timeline, np.full((16, 2), 0.9), t0_ns=0, period_ns=100_000_000, now_ns=0)
        rig.run()
        goals = rig.log.arrays()["goal_rad"]
        speed = np.diff(goals, axis=0) / 0.01
        assert np.abs(speed).max() > 0.5
        assert np.abs(np.diff(speed, axis=0)).max() <= 0.2 * (1 + 1e-9)
        assert (goals[-1] == goals[-2]).all()

    def test_a_chunk_that_comes_after_the_stop_does_not_move_it(self):
        rig = Rig(10)
        wait = rig.wait

        def wait_and_publish(due_ns: int) -> None:
            wait(due_ns)
            now = rig.now_ns
            publish(rig.state.timeline, np.full((16, 2), 0.9), t0_ns=now, period_ns=PERIOD_NS, now_ns=now)

        rig.run()
        ended = rig.loop.status.ticks
        rig.loop._wait = wait_and_publish
        rig.loop.run(rig.stop)
        assert rig.loop.status.ticks <= ended + 2
        assert (rig.state.command_q == [0.2, -0.1]).all()


def test_every_goal_is_sent_and_the_first_is_where_the_arm_is():
    rig = Rig(30)
    rig.run()
    assert len(rig.bus.goals) == rig.loop.status.ticks
    assert rig.bus.goals[0].tolist() == [0.2, -0.1]
    assert rig.log.arrays()["goal_rad"].tolist() == [goal.tolist() for goal in rig.bus.goals]


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


def test_real_time_measures_say_what_was_got():
    outcome: dict[str, str] = {}
    thread = threading.Thread(target=lambda: outcome.update(prepare_real_time()))
    thread.start()
    thread.join()
    import gc
    import sys

    gc.enable()
    gc.unfreeze()
    sys.setswitchinterval(0.005)
    assert set(outcome) == {"gc off", "switch interval", "SCHED_FIFO", "affinity"}
    assert all(answer == "got" or answer.startswith("not got: ") for answer in outcome.values())
