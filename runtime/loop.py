"""The control loop: at every deadline one tick, one exchange with the servos, one record. Compiled, without a lock.

Deadlines are absolute, k periods after the first. A tick that starts late runs late; a deadline whose whole period is
gone is missed, counted, and never made up for. The command of a tick is that of its deadline, so that lateness moves
when a command is sent and not the path. Nothing here decides where the arm goes: `tick` does.

From its first tick to its last the loop runs without the interpreter: what Python threads do, or hold, is nothing to
it. They reach it, and it reaches them, through the boxes of `mailbox.py` and the ring of `record.py`.
"""

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.protocol import OK, PORT_LOST, SERVO_FAULT
from onbeat.drivers.interfaces import Actuators, JointState
from onbeat.embodiment.errors import OnbeatError
from onbeat.kernels.arrays import copy_values
from onbeat.kernels.atomics import load_acquire, store_release
from onbeat.kernels.clock import monotonic_ns, new_timespec, sleep_until
from onbeat.kernels.compiled import compiled
from onbeat.runtime.faults import Fault
from onbeat.runtime.link import exchange, link_to, mailbox_link
from onbeat.runtime.mailbox import (
    ENDED_NS,
    FAULTY,
    LATEST_NS,
    MISSED,
    PROGRESS_WORDS,
    REFUSED_TICKS,
    RUN,
    STARTED_NS,
    STOP,
    TICKS,
    StateHistory,
    StateRing,
    append_state,
    new_words,
)
from onbeat.runtime.record import TickRing, append_tick, new_tick_ring
from onbeat.runtime.safety import (
    BUS_DEAD,
    LIMP,
    NO_FAULT,
    SILENCE_NS,
    TICK_MISSED,
    note_exchange,
    pushes,
    set_condition,
    watch,
)
from onbeat.runtime.tick import REFUSED, JointLimits, TickState, new_tick_state, tick
from onbeat.runtime.timeline import publish

# J joints.

REST_LIMIT_NS: Final = 2_000_000_000  # to come to rest; braking from 3 rad/s at 20 rad/s^2 takes 150 ms


class LoopFault(OnbeatError):
    """The loop had to stop. The text says why; the arm was left holding its last goal."""


class LoopBox(NamedTuple):
    """What a loop shares with others. command: (1,) int64, RUN or STOP. progress: (PROGRESS_WORDS,) int64.

    timespec, rest_by_ns: the loop's own, (2,) and (1,) int64: scratch, and when it must rest, 0 before it was told to.
    """

    command: NDArray[np.int64]
    progress: NDArray[np.int64]
    states: StateRing
    records: TickRing
    timespec: NDArray[np.int64]
    rest_by_ns: NDArray[np.int64]


def new_loop_box(states: StateRing, records: TickRing, progress: NDArray[np.int64]) -> LoopBox:
    """Of a loop that has not begun."""
    return LoopBox(new_words(1), progress, states, records, new_timespec(), new_words(1))


@dataclass(frozen=True, slots=True)
class LoopStatus:
    """What the loop says of itself. missed: deadlines that passed unused. faulty_ticks: whose exchange failed.

    started_ns: the first deadline; latest_ns: the end of the last tick; ended_ns: 0 while it runs.
    """

    ticks: int
    missed: int
    faulty_ticks: int
    refused: int
    started_ns: int
    latest_ns: int
    ended_ns: int


class ControlLoop:
    """Runs a robot's ticks on deadlines until told to stop, then brings the arm to rest. One thread calls `run`.

    records: where every tick goes, to be drained by another thread, given where nobody drains it while the loop runs.
    progress: words that only the loop writes, given where another process watches them.
    """

    def __init__(
        self,
        state: TickState,
        actuators: Actuators,
        *,
        history: StateHistory,
        records: TickRing | None = None,
        progress: NDArray[np.int64] | None = None,
    ) -> None:
        self.records = new_tick_ring(len(state.command_q)) if records is None else records
        self._state, self._actuators, self._history = state, actuators, history
        words = new_words(PROGRESS_WORDS) if progress is None else progress
        self._box = new_loop_box(history.ring, self.records, words)

    @property
    def rate_hz(self) -> float:
        return 1.0 / self._state.period_s

    @property
    def status(self) -> LoopStatus:
        words = (TICKS, MISSED, FAULTY, REFUSED_TICKS, STARTED_NS, LATEST_NS, ENDED_NS)
        return LoopStatus(*(load_acquire(self._box.progress, word) for word in words))

    def read_first(self) -> None:
        """Read the joints once, before the first tick: it starts where they are. Raises BusError."""
        state, joints = self._state, len(self._state.command_q)
        into = JointState(0, np.zeros(joints), np.zeros(joints), np.zeros(joints))
        self._actuators.read(into)
        state.measured_q[:], state.measured_dq[:] = into.position_rad, into.velocity_rad_s
        state.measured_load[:] = into.load
        self._history.append(into.t_ns, into.position_rad)

    def hold(self) -> None:
        """Torque on, before the first tick: it starts from the goal that holds the arm then, and nothing jumps.

        A reading after that would not do: an arm that takes its own weight gives a little. Raises BusError.
        """
        self.read_first()
        self._state.measured_q[:] = self._actuators.enable(True)

    def stop(self) -> None:
        """Have the loop come to rest and end; from any thread, any number of times."""
        set_condition(self._state.safety, Fault.STOP_REQUESTED, True)
        store_release(self._box.command, 0, STOP)

    def run(self) -> None:
        """Tick until told to stop, then until the command rests. Raises LoopFault, PortLost: servos hold the last goal.

        Raises RateTooHigh before the first tick when the bus cannot carry it.
        """
        with link_to(self._actuators, rate_hz=self.rate_hz) as linked:
            outcome = run_loop(self._state, linked.link, self._box)
            if outcome == OK:
                return
            error = linked.explains.error_of(outcome)
        if outcome & 15 == PORT_LOST:
            raise error
        raise LoopFault(f"no good exchange with the servos for {SILENCE_NS / 1e9:g} s: {error}") from error


def compile_ahead(limits: JointLimits) -> None:
    """Compile the loop and what feeds it (half a minute at the very first run, then kept): nothing is driven."""
    joints = len(limits.q_min)
    state, history = new_tick_state(limits, rate_hz=100.0, rows=2), StateHistory(joints)
    box = new_loop_box(history.ring, new_tick_ring(joints, 1), new_words(PROGRESS_WORDS))
    store_release(box.command, 0, STOP)
    publish(state.timeline, np.zeros((2, joints)), t0_ns=0, period_ns=1, now_ns=0)
    run_loop(state, mailbox_link(joints), box)  # ends before its first tick


@compiled
def run_loop(state, link, box):
    """Tick on deadlines; returns OK at rest after a stop, or the fault code that ended it (feetech.protocol).

    state: TickState. link: link.Link. box: LoopBox.
    """
    period_ns = round(state.period_s * 1e9)
    due_ns = monotonic_ns(box.timespec) + period_ns
    store_release(box.progress, STARTED_NS, due_ns)
    outcome, failed, tell_ns = OK, OK, 0
    while outcome == OK and not _is_over(state, box, due_ns):
        start_ns = sleep_until(due_ns, box.timespec)
        flags = tick(state, due_ns)
        sent_ns = monotonic_ns(box.timespec)
        answer = exchange(link, state.command_q, sent_ns)
        read_ns = monotonic_ns(box.timespec)
        append_tick(box.records, state, due_ns, start_ns, sent_ns - start_ns, read_ns - sent_ns, tell_ns, answer)
        _take_joints(state, link.wire, box.states, answer)
        note_exchange(state.safety, answer, link.wire.counts, link.wire.status, link.wire.temperature_c)
        if _count_tick(box.progress, flags, answer):
            failed = answer
        outcome = answer if answer & 15 == PORT_LOST else OK
        done_ns = monotonic_ns(box.timespec)
        due_ns, missed = next_deadline(due_ns, done_ns, period_ns)
        box.progress[MISSED] += missed
        state.safety.inputs.events[TICK_MISSED] += missed
        store_release(box.progress, LATEST_NS, done_ns)
        tell_ns = done_ns - read_ns
    if outcome != OK:  # no tick comes that would see it
        watch(state.safety, due_ns, False, state.measured_load)
    elif state.safety.ended_by[0] == BUS_DEAD:
        outcome = failed
    store_release(box.progress, ENDED_NS, monotonic_ns(box.timespec))
    return outcome


@compiled
def next_deadline(due_ns, now_ns, period_ns):
    """(the deadline after `due_ns` whose period is not gone by now, how many were let go in between)."""
    missed = max(0, (now_ns - due_ns) // period_ns - 1)
    return due_ns + (1 + missed) * period_ns, missed


@compiled
def _is_over(state, box, due_ns):
    """Whether the arm rests after a stop or a fault that ends the run, or had its time to; every chunk is withdrawn.

    A fault that says "limp" leaves no time: the caller takes torque off.
    """
    if load_acquire(box.command, 0) == RUN and state.safety.ended_by[0] == NO_FAULT:
        return False
    if state.safety.level[0] >= LIMP:
        return True
    if box.rest_by_ns[0] == 0:
        store_release(state.timeline.closed, 0, 1)
        box.rest_by_ns[0] = due_ns + REST_LIMIT_NS
        return math.isnan(state.command_q[0])
    return _rests(state) or due_ns > box.rest_by_ns[0]


@compiled
def _rests(state):
    """Whether the command stands still, and no joint is left pushing for its servo to give up later."""
    for speed in state.command_v:
        if speed != 0.0:
            return False
    return state.safety.silent[0] > 0 or not pushes(state.safety, state.measured_load)


@compiled
def _take_joints(state, wire, states, answer):
    """Show the joints to the next tick and to whoever observes; joints that were not read stay what they were."""
    if answer & 15 != OK and answer & 15 != SERVO_FAULT:
        return
    copy_values(state.measured_q, wire.position_rad)
    copy_values(state.measured_dq, wire.velocity_rad_s)
    copy_values(state.measured_load, wire.load)
    append_state(states, wire.t_ns[0], wire.position_rad)


@compiled
def _count_tick(progress, flags, answer):
    """Count; returns whether the exchange failed."""
    progress[TICKS] += 1
    progress[REFUSED_TICKS] += 1 if flags & REFUSED else 0
    has_failed = answer & 15 != OK and answer & 15 != SERVO_FAULT
    progress[FAULTY] += 1 if has_failed else 0
    return has_failed
