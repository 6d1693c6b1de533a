"""The control loop: at every deadline one tick, one exchange with the servos, one record.

Deadlines are absolute, k periods after the first. A tick that starts late runs late; a deadline whose whole period is
gone is missed, counted, and never made up for. The command of a tick is that of its deadline, so that lateness moves
when a command is sent and not the path. Nothing here decides where the arm goes: `tick` does.
"""

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.errors import BusError, PortLost, ServoFault
from onbeat.drivers.interfaces import Actuators, JointState
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.record import TickLog
from onbeat.runtime.tick import REFUSED, TickState, tick
from onbeat.runtime.timeline import close

# J joints.

SPIN_NS = 150_000  # before a deadline the loop spins: sleep overshoots by 60 to 120 us, docs/decisions/0012
MAX_FAULTY_TICKS = 5  # in a row, each after the bus driver's own retries: 0.3 s without an answer
REST_LIMIT_NS = 2_000_000_000  # to come to rest; braking from 3 rad/s at 20 rad/s^2 takes 150 ms
FIFO_PRIORITY = 50
LOCK_HOLDER_PRIORITY = 1  # below the loop and above every ordinary thread
SWITCH_INTERVAL_S = 0.0005


class LoopFault(OnbeatError):
    """The loop had to stop. The text says why; the arm was left holding its last goal."""


class ExchangingActuators(Actuators, Protocol):
    """Actuators that write goals and read the state in one burst."""

    def exchange(self, goal_rad: NDArray[np.float64], into: JointState) -> None: ...


class StateHistory:
    """The last joint states of the loop, for the thread that observes. One writer, any number of readers.

    Holds `capacity` states; a reader that asks for a time gets the joints at that time, so that what the policy is
    told of the arm is of the instant its cameras show.
    """

    def __init__(self, joints: int, capacity: int = 256) -> None:
        self._t_ns = np.zeros(capacity, np.int64)
        self._q = np.zeros((capacity, joints))
        self._count = 0

    def append(self, t_ns: int, position_rad: NDArray[np.float64]) -> None:
        """Add a state, position_rad (J,), newer than all before."""
        k = self._count % len(self._t_ns)
        self._t_ns[k], self._q[k] = t_ns, position_rad
        self._count += 1

    def at(self, t_ns: int) -> NDArray[np.float64] | None:
        """The joints (J,) at a time, linear between states, the nearest outside them; None before the first."""
        count, size = self._count, len(self._t_ns)
        if count == 0:
            return None
        order = np.arange(max(0, count - size + 2), count) % size  # but for the two that may be written meanwhile
        times, states = self._t_ns[order], self._q[order]
        return np.array([np.interp(t_ns - times[0], times - times[0], joint) for joint in states.T])


@dataclass(slots=True)
class LoopStatus:
    """What the loop says of itself; written by it, read by anyone. missed: deadlines that passed unused."""

    ticks: int = 0
    missed: int = 0
    faulty_ticks: int = 0
    refused: int = 0
    started_ns: int = 0
    ended_ns: int = 0


class ControlLoop:
    """Runs a robot's ticks on deadlines until told to stop, then brings the arm to rest. One thread calls `run`."""

    def __init__(
        self,
        state: TickState,
        bus: ExchangingActuators,
        *,
        log: TickLog,
        history: StateHistory,
        clock: Callable[[], int] = time.monotonic_ns,
        wait: Callable[[int], None] | None = None,
    ) -> None:
        self.status = LoopStatus()
        self._state, self._bus, self._log, self._history = state, bus, log, history
        self._clock, self._wait = clock, wait or wait_until
        self._period_ns = round(state.period_s * 1e9)
        joints = len(state.command_q)
        self._joints = JointState(0, np.zeros(joints), np.zeros(joints), np.zeros(joints))
        self._faults_in_a_row = 0

    def read_first(self) -> None:
        """Read the joints once, before the first tick: it starts where they are. Raises BusError."""
        self._bus.read(self._joints)
        self._take_state()

    def run(self, stop: threading.Event) -> None:
        """Tick until `stop`, then until the command rests. Raises LoopFault, BusError: servos hold the last."""
        due_ns = self.status.started_ns = self._clock() + self._period_ns
        rest_by_ns: int | None = None
        while rest_by_ns is None or not self._is_at_rest(due_ns, rest_by_ns):
            if stop.is_set():
                close(self._state.timeline)
                rest_by_ns = rest_by_ns or due_ns + REST_LIMIT_NS
            self._wait(due_ns)
            self._step(due_ns)
            due_ns = self._next_deadline(due_ns)
        self.status.ended_ns = self._clock()

    def _step(self, due_ns: int) -> None:
        start_ns = self._clock()
        flags = tick(self._state, due_ns)
        sent_ns = self._clock()
        self._exchange()
        exchange_ns = self._clock() - sent_ns
        self._take_state()
        self._log.append(self._state, due_ns=due_ns, start_ns=start_ns, exchange_ns=exchange_ns)
        self.status.ticks += 1
        self.status.refused += bool(flags & REFUSED)

    def _exchange(self) -> None:
        try:
            self._bus.exchange(self._state.command_q, self._joints)
            self._faults_in_a_row = 0
        except PortLost:
            raise
        except BusError as fault:
            self.status.faulty_ticks += 1
            self._faults_in_a_row += 1
            if self._faults_in_a_row >= MAX_FAULTY_TICKS:
                what = "a servo protects itself" if isinstance(fault, ServoFault) else "the servo bus failed"
                raise LoopFault(f"{what}, {MAX_FAULTY_TICKS} ticks in a row: {fault}") from fault

    def _take_state(self) -> None:
        state, joints = self._state, self._joints
        state.measured_q[:], state.measured_dq[:] = joints.position_rad, joints.velocity_rad_s
        state.measured_load[:] = joints.load
        if self._faults_in_a_row == 0:
            self._history.append(joints.t_ns, joints.position_rad)

    def _next_deadline(self, due_ns: int) -> int:
        missed = max(0, (self._clock() - due_ns) // self._period_ns - 1)
        self.status.missed += missed
        return due_ns + (1 + missed) * self._period_ns

    def _is_at_rest(self, now_ns: int, rest_by_ns: int) -> bool:
        return not self._state.command_v.any() or now_ns > rest_by_ns


def wait_until(due_ns: int) -> None:
    """Return at `due_ns` (monotonic): sleep to shortly before it, then spin."""
    remaining_ns = due_ns - time.monotonic_ns() - SPIN_NS
    if remaining_ns > 0:
        time.sleep(remaining_ns * 1e-9)
    while time.monotonic_ns() < due_ns:
        pass


def prepare_real_time() -> dict[str, str]:
    """Ask for what helps the calling thread meet deadlines; each is "got" or "not got: why".

    The collector is off and what exists is out of its sight, the interpreter hands over sooner, this thread runs under
    SCHED_FIFO and stays on one processor.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    measures = {"SCHED_FIFO": _run_first, "affinity": _stay_on_one_processor}
    return {"gc off": "got", "switch interval": "got", **{name: _ask(measure) for name, measure in measures.items()}}


def prepare_lock_holder() -> str:
    """Run the calling thread before ordinary ones: "got" or "not got: why".

    For every other thread of the loop's process: one that is set aside by the kernel while it has the interpreter's
    lock makes the loop wait for as long, whatever the loop's own priority is (docs/decisions/0013). Not needed any
    more once the loop runs without that lock.
    """
    return _ask(lambda: _schedule(os.SCHED_RR, LOCK_HOLDER_PRIORITY))


def _ask(measure: Callable[[], None]) -> str:
    try:
        measure()
    except OSError as refusal:
        return f"not got: {refusal.strerror}"
    return "got"


def _run_first() -> None:
    _schedule(os.SCHED_FIFO, FIFO_PRIORITY)


def _schedule(policy: int, priority: int) -> None:
    """For the calling thread; threads and processes started from it do not inherit it."""
    os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, os.sched_param(priority))


def _stay_on_one_processor() -> None:
    """The last one: interrupts and what else is bound by default sit on the first."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
