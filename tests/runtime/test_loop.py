"""The compiled loop in real time: what a fault does to it, its deadlines, and how it ends."""

import ctypes
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from onbeat.drivers.feetech.errors import NoReply, PortLost
from onbeat.drivers.feetech.fake import FakeBus
from onbeat.drivers.interfaces import JointState
from onbeat.runtime.faults import Fault
from onbeat.runtime.loop import SILENCE_NS, ControlLoop, LoopFault, compile_ahead, next_deadline
from onbeat.runtime.mailbox import StateHistory
from onbeat.runtime.record import TickLog
from onbeat.runtime.tick import REFUSED, JointLimits, new_tick_state
from onbeat.runtime.timeline import publish

pytestmark = pytest.mark.alone

JOINTS = ("pan", "grip")
RATE_HZ = 200
PERIOD_NS = 1_000_000_000 // RATE_HZ
LIMITS = JointLimits(*(np.full(2, bound) for bound in (-1.0, 1.0, 2.0, 20.0, np.inf)))


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    compile_ahead(LIMITS)


class ShakyBus(FakeBus):
    """A fake bus that raises `faults[n]` at its n-th write."""

    def __init__(self) -> None:
        super().__init__(JOINTS)
        self.faults: dict[int, Exception] = {}
        self.writes = 0
        self.position_rad[:] = [0.2, -0.1]
        self.enable(True)

    def write(self, goal_rad: np.ndarray) -> None:
        self.writes += 1
        if self.writes in self.faults:
            raise self.faults[self.writes]
        super().write(goal_rad)


class Rig:
    """A loop on a fake bus behind a mailbox."""

    def __init__(self, limits: JointLimits = LIMITS) -> None:
        self.bus = ShakyBus()
        self.log = TickLog()
        self.history = StateHistory(len(JOINTS))
        self.state = new_tick_state(limits, rate_hz=RATE_HZ, rows=16)
        self.loop = ControlLoop(self.state, self.bus, history=self.history)
        self.loop.read_first()

    def sway(self) -> None:
        """A chunk that pulls both joints as fast as they may."""
        now_ns = time.monotonic_ns()
        publish(self.state.timeline, np.full((16, 2), 0.9), t0_ns=now_ns, period_ns=100_000_000, now_ns=now_ns)

    def run(self, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> dict[str, np.ndarray]:
        """Let the loop tick for a while, then stop it; returns its ticks. Raises what the loop raised."""
        raised: list[BaseException] = []

        def guard() -> None:
            try:
                self.loop.run()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=guard)
        thread.start()
        meanwhile()
        thread.join(seconds)
        self.loop.stop()
        thread.join(10.0)
        self.log.take(self.loop.records)
        if raised:
            raise raised[0]
        return self.log.records()


class TestFaults:
    def test_one_lost_exchange_is_counted_and_survived(self):
        rig = Rig()
        rig.bus.faults = {7: NoReply("servo 1 did not reply")}
        ticks = rig.run(0.3)
        assert rig.loop.status.faulty_ticks == np.count_nonzero(ticks["outcome"]) >= 1
        assert ticks["outcome"][-1] == 0
        assert rig.loop.status.ticks > 20

    def test_dead_servos_stop_the_loop_and_say_why(self):
        rig = Rig()
        rig.bus.faults = {n: NoReply("servo 3 did not reply") for n in range(1, 1000)}
        with pytest.raises(LoopFault, match=r"no good exchange.*servo 3 did not reply.*check its cable"):
            rig.run(30.0)
        assert rig.loop.status.faulty_ticks >= SILENCE_NS // PERIOD_NS

    def test_dead_servos_are_told_to_rest_before_the_loop_leaves_them(self):
        """At 3 rad/s^2 that takes longer than to give the bus up."""
        rig = Rig(LIMITS._replace(v_max=np.full(2, 1.5), a_max=np.full(2, 3.0)))
        rig.bus.faults = {n: NoReply("servo 3 did not reply") for n in range(110, 1000)}
        with pytest.raises(LoopFault, match="no good exchange"):
            rig.run(30.0, rig.sway)
        goals = rig.log.records()["goal_rad"]
        speed = np.diff(goals, axis=0) * RATE_HZ
        assert np.abs(speed).max() > 1.2
        assert (goals[-1] == goals[-2]).all()
        assert np.abs(np.diff(speed, axis=0)).max() <= 3.0 / RATE_HZ * (1 + 1e-9)

    def test_actuators_that_hang_stop_it_too(self):
        rig, release = Rig(), threading.Event()
        rig.bus.write = lambda _: release.wait(5.0)  # pyright: ignore[reportAttributeAccessIssue]
        threading.Timer(1.5, release.set).start()
        with pytest.raises(LoopFault, match="gave no answer in time"):
            rig.run(30.0)

    def test_a_pulled_cable_stops_it_at_once(self):
        rig = Rig()
        rig.bus.faults = {5: PortLost("the port is gone")}
        with pytest.raises(PortLost, match="plug the adapter in again"):
            rig.run(30.0)
        assert rig.loop.status.faulty_ticks == 1

    def test_actuators_that_raise_anything_stop_it(self):
        rig = Rig()
        rig.bus.faults = {5: ZeroDivisionError("in the SDK")}
        with pytest.raises(ZeroDivisionError, match="in the SDK"):
            rig.run(30.0)

    def test_an_arm_that_was_never_read_gets_no_command(self):
        rig = Rig()
        rig.state.measured_q[:] = np.nan
        rig.bus.read = hide_position  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(LoopFault):
            rig.run(30.0)
        rig.log.take(rig.loop.records)
        assert rig.bus.goals == []
        assert (rig.log.records()["flags"] & REFUSED).all()


def hide_position(into: JointState) -> None:
    into.t_ns = time.monotonic_ns()
    into.position_rad[:] = np.nan


class TestDeadlines:
    @pytest.mark.parametrize(
        ("now", "due", "missed"),
        [(0, 10, 0), (9, 10, 0), (10, 10, 0), (19, 10, 0), (20, 20, 1), (37, 30, 2), (40, 40, 3), (-5, 10, 0)],
    )
    def test_one_whose_period_is_gone_is_missed(self, now: int, due: int, missed: int):
        assert next_deadline(0, now, 10) == (due, missed)

    def test_are_absolute(self):
        ticks = Rig().run(0.5)
        steps = np.diff(ticks["due_ns"])
        assert len(steps) > 20
        assert (steps % PERIOD_NS == 0).all()
        assert (ticks["start_ns"] >= ticks["due_ns"]).all()
        assert (ticks["t_ns"] == ticks["due_ns"]).all()

    def test_missed_ones_are_counted_and_never_made_up_for(self):
        rig = Rig()
        ticks = rig.run(0.5)
        periods = (ticks["due_ns"][-1] - ticks["due_ns"][0]) // PERIOD_NS
        assert len(ticks["due_ns"]) == rig.loop.status.ticks
        missed_at_the_end = rig.loop.status.missed - (periods + 1 - rig.loop.status.ticks)
        assert 0 <= missed_at_the_end <= 2
        assert (np.diff(ticks["due_ns"]) >= PERIOD_NS).all()


class TestStop:
    def test_a_moving_arm_is_brought_to_rest_within_its_limits(self):
        rig = Rig()
        goals = rig.run(0.4, rig.sway)["goal_rad"]
        speed = np.diff(goals, axis=0) * RATE_HZ
        assert np.abs(speed).max() > 0.5
        assert np.abs(np.diff(speed, axis=0)).max() <= 20.0 / RATE_HZ * (1 + 1e-9)
        assert (goals[-1] == goals[-2]).all()

    def test_an_arm_that_pushes_is_not_left_pushing(self):
        rig = Rig()
        rig.bus.step_rad = 0.0  # nothing moves, and the load is how far the goal is away
        ticks = rig.run(0.8, rig.sway)
        assert np.abs(ticks["load"]).max() > 0.9
        is_pushing, is_stopping = (ticks["faults"] >> fault & 1 for fault in (Fault.SERVO_LOAD, Fault.STOP_REQUESTED))
        assert (is_stopping >= is_pushing).all(), "it was told to stop before that was a fault"
        assert np.abs(rig.state.measured_load).max() <= 0.75
        assert (ticks["goal_rad"][-1] == ticks["goal_rad"][-2]).all()

    def test_a_chunk_that_comes_after_the_stop_does_not_move_it(self):
        rig = Rig()
        rig.loop.stop()
        ticks = rig.run(1.0, rig.sway)
        assert len(ticks["due_ns"]) == 0
        rig.sway()
        assert np.isnan(rig.state.command_q).all()


def test_the_first_goal_is_where_the_arm_is():
    rig = Rig()
    ticks = rig.run(0.3)
    assert rig.bus.goals[0].tolist() == [0.2, -0.1]
    sent = {tuple(goal) for goal in ticks["goal_rad"].tolist()}
    assert {tuple(goal.tolist()) for goal in rig.bus.goals} <= sent


def test_what_the_loop_reads_can_be_observed():
    rig = Rig()
    ticks = rig.run(0.4, rig.sway)
    newest = rig.history.at(time.monotonic_ns())
    assert newest is not None
    np.testing.assert_allclose(newest, ticks["goal_rad"][-1], atol=0.05)


def test_other_threads_hold_the_interpreter_and_the_loop_does_not_notice():
    """One thread never lets go of the interpreter for 250 ms: a loop that needed it would do nothing."""
    rig = Rig()
    held_ns: list[int] = []

    def hold_interpreter() -> None:
        time.sleep(0.1)
        held_ns.append(time.monotonic_ns())
        ctypes.PyDLL(None).usleep(250_000)  # PyDLL: called without letting go
        held_ns.append(time.monotonic_ns())

    ticks = rig.run(0.2, hold_interpreter)
    inside = (ticks["start_ns"] > held_ns[0]) & (ticks["start_ns"] < held_ns[1])
    assert np.count_nonzero(inside) > 20
    assert held_ns[1] - held_ns[0] >= 250_000_000
