"""What goes in and out of the compiled loop, without a lock: each box has one writer, and no reader makes it wait.

    commands  ──▶ ┌──────┐ ──▶ progress       words; a guardian may watch them from another process
    goals     ◀── │ loop │ ──▶ joint states   the last second, for whoever observes
    answers   ──▶ └──────┘ ──▶ tick records   `record.py`

Goals and answers are for actuators that are no serial bus (a simulator, a vendor's SDK): a thread of Python's serves
them as fast as it can (`link.py`), and the loop goes on with the newest answer meanwhile.
"""

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from onbeat.drivers.feetech.protocol import GOAL_REFUSED, NO_REPLY, OK, SERVO_FAULT
from onbeat.kernels.arrays import copy_values
from onbeat.kernels.atomics import begin_read, begin_write, end_write, fence, is_intact, load_acquire, store_release
from onbeat.kernels.compiled import compiled

# J joints, N states remembered, A answers.

RUN: Final = 0
STOP: Final = 1  # come to rest, then end

# Words of `progress`, written by the loop alone.
TICKS: Final = 0
MISSED: Final = 1  # deadlines that passed unused
FAULTY: Final = 2  # ticks whose exchange failed
REFUSED_TICKS: Final = 3
STARTED_NS: Final = 4
ENDED_NS: Final = 5
LATEST_NS: Final = 6  # when the last tick was done
PROGRESS_WORDS: Final = 7

ANSWERS: Final = 4  # the newest is read while the next is written
STALE_NS: Final = 100_000_000  # an answer of mailbox actuators older than this counts as none

_write: Any = types.ExternalFunction("write", types.intp(types.int32, types.voidptr, types.uintp))


def new_words(count: int) -> NDArray[np.int64]:
    """Words (count,), all 0, that threads share; another process may be shown ones that lie in shared memory."""
    return np.zeros(count, np.int64)


class StateHistory:
    """The last joint states of the loop, for the thread that observes. One writer, any number of readers.

    Holds `capacity` states; a reader that asks for a time gets the joints at that time, so that what the policy is
    told of the arm is of the instant its cameras show. `ring` is what compiled code appends to.
    """

    def __init__(self, joints: int, capacity: int = 512) -> None:
        self.ring = StateRing(np.zeros(capacity, np.int64), np.zeros((capacity, joints)), new_words(1))

    def append(self, t_ns: int, position_rad: NDArray[np.float64]) -> None:
        """Add a state, position_rad (J,), newer than all before."""
        append_state(self.ring, t_ns, position_rad)

    def at(self, t_ns: int) -> NDArray[np.float64] | None:
        """The joints (J,) at a time, linear between states, the nearest outside them; None before the first."""
        while count := load_acquire(self.ring.appended, 0):
            size = len(self.ring.t_ns)
            order = np.arange(max(0, count - size), count)
            times, states = self.ring.t_ns[order % size], self.ring.position_rad[order % size]
            fence()
            whole = order > load_acquire(self.ring.appended, 0) - size  # the others were overwritten during the copy
            if whole.any():
                times, states = times[whole], states[whole]
                return np.array([np.interp(t_ns - times[0], times - times[0], joint) for joint in states.T])
        return None


class StateRing(NamedTuple):
    """t_ns (N,) int64, position_rad (N, J) float64; appended (1,): states ever, of which state k lies at k % N."""

    t_ns: NDArray[np.int64]
    position_rad: NDArray[np.float64]
    appended: NDArray[np.int64]


@compiled
def append_state(ring, t_ns, position_rad):
    """Add a state newer than all before. ring: StateRing. position_rad: (J,)."""
    fence()  # a reader that sees any of what follows sees that the last state is complete
    count = ring.appended[0]
    k = count % ring.t_ns.shape[0]
    ring.t_ns[k] = t_ns
    copy_values(ring.position_rad[k], position_rad)
    store_release(ring.appended, 0, count + 1)


class ActuatorBox(NamedTuple):
    """Goals out, answers in.

    wake_fd: an event counter, raised once per goal; `one` is what is written there. goal_word: (1,) int64, seqlock of
    goal_rad (J,). answer_count: (1,) int64, answers ever given, the newest lies at (count - 1) % A. answer: (A, 2)
    int64, when the joints were so (monotonic ns) and a fault code of `feetech.protocol`. joints: (A, 3, J), position
    rad, velocity rad/s, load.
    """

    wake_fd: int
    one: NDArray[np.uint64]
    goal_word: NDArray[np.int64]
    goal_rad: NDArray[np.float64]
    answer_count: NDArray[np.int64]
    answer: NDArray[np.int64]
    joints: NDArray[np.float64]


def new_actuator_box(joints: int, wake_fd: int = -1) -> ActuatorBox:
    """Empty: no goal yet, no answer yet."""
    return ActuatorBox(
        wake_fd,
        np.ones(1, np.uint64),
        new_words(1),
        np.zeros(joints),
        new_words(1),
        np.zeros((ANSWERS, 2), np.int64),
        np.zeros((ANSWERS, 3, joints)),
    )


@compiled
def exchange_mailbox(box, wire, goal_rad, now_ns):
    """Leave goals (J,) rad, take the newest answer into `wire`; returns a fault code as `exchange_joints` does."""
    for goal in goal_rad:
        if not math.isfinite(goal):
            return GOAL_REFUSED
    begin_write(box.goal_word)
    copy_values(box.goal_rad, goal_rad)
    end_write(box.goal_word)
    _write(box.wake_fd, box.one.ctypes, 8)
    outcome = _take_answer(box, wire)
    return NO_REPLY if outcome in (OK, SERVO_FAULT) and now_ns - wire.t_ns[0] > STALE_NS else outcome


@compiled
def _take_answer(box, wire):
    """Copy the newest answer. NO_REPLY: there is none, or so many came during the copy that it may be torn."""
    count = load_acquire(box.answer_count, 0)
    if count == 0:
        return NO_REPLY
    k = (count - 1) % ANSWERS
    wire.t_ns[0], outcome = box.answer[k, 0], box.answer[k, 1]
    copy_values(wire.position_rad, box.joints[k, 0])
    copy_values(wire.velocity_rad_s, box.joints[k, 1])
    copy_values(wire.load, box.joints[k, 2])
    fence()
    return outcome if load_acquire(box.answer_count, 0) - count < ANSWERS - 1 else NO_REPLY


@compiled
def take_goal(box, out):
    """Copy the newest goal into `out` (J,); False when it was being written meanwhile: ask again."""
    begun = begin_read(box.goal_word)
    copy_values(out, box.goal_rad)
    return is_intact(box.goal_word, begun)


@compiled
def put_answer(box, t_ns, outcome, position_rad, velocity_rad_s, load):
    """Show the joints, (J,) each, to the loop. outcome: OK, or a fault code; then the joints are the last known."""
    fence()
    count = box.answer_count[0]
    k = count % ANSWERS
    box.answer[k, 0], box.answer[k, 1] = t_ns, outcome
    copy_values(box.joints[k, 0], position_rad)
    copy_values(box.joints[k, 1], velocity_rad_s)
    copy_values(box.joints[k, 2], load)
    store_release(box.answer_count, 0, count + 1)
