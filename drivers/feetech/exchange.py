"""One exchange on an open port, compiled: write, wait, read, check, retry. Never touches the interpreter's lock.

The loop may call `exchange_joints` from compiled code of its own; `device.py` calls it from Python. A pty and a serial
port are the same here. Linux only: libc by name, `pollfd` and `timespec` as little-endian words. Waiting is `ppoll`,
which counts in nanoseconds: at 200 Hz the millisecond of `poll` would be a fifth of a period.
"""

from typing import Any, Final, NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from onbeat.drivers.feetech.protocol import (
    GOAL_REFUSED,
    LATE_REPLY,
    NO_REPLY,
    OK,
    OVERHEAD,
    PORT_LOST,
    SERVO_FAULT,
    put_goals,
    put_request,
    take_states,
)
from onbeat.drivers.feetech.tables import STATE_ADDRESS, STATE_SIZE
from onbeat.kernels.clock import monotonic_ns
from onbeat.kernels.compiled import compiled

_read: Any = types.ExternalFunction("read", types.intp(types.int32, types.voidptr, types.uintp))
_write: Any = types.ExternalFunction("write", types.intp(types.int32, types.voidptr, types.uintp))
_ppoll: Any = types.ExternalFunction("ppoll", types.int32(types.voidptr, types.uintp, types.voidptr, types.voidptr))
_errno: Any = types.ExternalFunction("__errno_location", types.CPointer(types.int32)())

_NS_PER_S: Final = 1_000_000_000
MAX_DRAIN_READS: Final = 64
_POLLIN: Final = 1
_POLLOUT: Final = 4
_EINTR: Final = 4
_EAGAIN: Final = 11


class Wire(NamedTuple):
    """Everything an exchange touches, allocated once. J joints.

    ids, zero_steps, direction: (J,), one servo each. position_rad, velocity_rad_s, load, status, temperature_c: (J,),
    newest answer.
    t_ns: [0] monotonic clock, middle of the newest good exchange. counts: by fault code of `protocol`.
    limits: [0] time-out ns, [1] for how long after a fault what comes is discarded, ns, [2] retries.
    """

    fd: int
    ids: NDArray[np.uint8]
    zero_steps: NDArray[np.int64]
    direction: NDArray[np.int64]
    position_rad: NDArray[np.float64]
    velocity_rad_s: NDArray[np.float64]
    load: NDArray[np.float64]
    status: NDArray[np.uint8]
    temperature_c: NDArray[np.float64]
    t_ns: NDArray[np.int64]
    counts: NDArray[np.int64]
    limits: NDArray[np.int64]
    outgoing: NDArray[np.uint8]
    incoming: NDArray[np.uint8]
    pollfd: NDArray[np.int32]
    timespec: NDArray[np.int64]


@compiled
def _was_interrupted() -> bool:
    code = _errno()[0]
    return code in (_EINTR, _EAGAIN)


@compiled
def wait_ready(wire: Wire, events: int, timeout_ns: int) -> int:
    """Wait for the port: 1 ready, 0 time-out, -1 the port is gone."""
    wire.pollfd[0] = wire.fd
    wire.pollfd[1] = events
    left_ns = max(0, timeout_ns)
    wire.timespec[0], wire.timespec[1] = left_ns // _NS_PER_S, left_ns % _NS_PER_S
    ready = _ppoll(wire.pollfd.ctypes, 1, wire.timespec.ctypes, 0)
    if ready < 0:
        return 0 if _was_interrupted() else -1
    returned = (wire.pollfd[1] >> 16) & 0xFFFF
    if ready == 0 or returned & events:
        return min(ready, 1)
    return -1


@compiled
def read_some(wire: Wire, start: int, end: int) -> int:
    """Read what is there into incoming[start:end]: bytes, 0 when nothing was, -1 when the port is gone."""
    count = _read(wire.fd, wire.incoming[start:end].ctypes, end - start)
    if count > 0:
        return count
    return 0 if count < 0 and _was_interrupted() else -1


@compiled
def drain(wire: Wire, for_ns: int) -> int:
    """Discard what comes within `for_ns` and what lies there then; returns bytes discarded, -1 when the port is gone.

    A line that never falls silent is left in time and after MAX_DRAIN_READS, so that noise cannot keep the loop.
    """
    deadline_ns = monotonic_ns(wire.timespec) + for_ns
    discarded = 0
    for _ in range(MAX_DRAIN_READS):
        ready = wait_ready(wire, _POLLIN, deadline_ns - monotonic_ns(wire.timespec))
        if ready <= 0:
            return ready if ready < 0 else discarded
        count = read_some(wire, 0, wire.incoming.size)
        if count < 0:
            return -1
        discarded += count
    return discarded


@compiled
def send(wire: Wire, length: int, deadline_ns: int) -> int:
    """Write outgoing[:length]: OK, or PORT_LOST when the port takes nothing before the deadline or is gone."""
    sent = 0
    while sent < length:
        count = _write(wire.fd, wire.outgoing[sent:length].ctypes, length - sent)
        if count > 0:
            sent += count
            continue
        if not _was_interrupted() or wait_ready(wire, _POLLOUT, deadline_ns - monotonic_ns(wire.timespec)) < 0:
            return PORT_LOST
        if monotonic_ns(wire.timespec) >= deadline_ns:
            return PORT_LOST
    return OK


@compiled
def receive(wire: Wire, length: int, deadline_ns: int) -> int:
    """Read `length` bytes into incoming; returns how many came before the deadline, -1 when the port is gone.

    What has come is taken even when this process slept past the deadline: the servos were in time.
    """
    received = 0
    while received < length:
        left_ns = deadline_ns - monotonic_ns(wire.timespec)
        ready = wait_ready(wire, _POLLIN, left_ns)
        if ready < 0:
            return -1
        count = read_some(wire, received, length) if ready else 0
        if count < 0:
            return -1
        received += count
        if ready == 0 and left_ns <= 0:
            return received
    return received


@compiled
def transact(wire: Wire, length: int, reply_length: int) -> int:
    """Send outgoing[:length] and read `reply_length` bytes; returns how many came, -1 when the port is gone.

    What lies in the input from before belongs to a request that was given up: discarded and counted as LATE_REPLY.
    """
    stale = drain(wire, 0)
    if stale < 0:
        return -1
    if stale > 0:
        wire.counts[LATE_REPLY] += 1
    deadline_ns = monotonic_ns(wire.timespec) + wire.limits[0]
    if send(wire, length, deadline_ns) != OK:
        return -1
    return receive(wire, reply_length, deadline_ns)


@compiled
def exchange_joints(wire: Wire, goal_rad: NDArray[np.float64], writes: bool, reads: bool) -> int:
    """Send goals (J,) in rad when `writes`, then read every joint when `reads`, in one burst.

    Returns OK or fault + 16 joint, as `take_states`; nothing is sent on GOAL_REFUSED. A wire fault is retried within
    limits[2]; every fault is counted. Takes (limits[0] + limits[1]) * (1 + limits[2]) at most.
    """
    length = 0
    if writes:
        length = put_goals(wire.outgoing, 0, wire.ids, goal_rad, wire.zero_steps, wire.direction)
        if length < 0:
            wire.counts[GOAL_REFUSED] += 1
            return GOAL_REFUSED + 16 * (-1 - length)
    if reads:
        length = put_request(wire.outgoing, length, wire.ids, STATE_ADDRESS, STATE_SIZE)
    outcome = NO_REPLY
    for _ in range(1 + wire.limits[2]):
        outcome = _try_once(wire, length, wire.ids.size * (STATE_SIZE + OVERHEAD) if reads else 0)
        wire.counts[outcome & 15] += 1
        if outcome & 15 in (OK, SERVO_FAULT, PORT_LOST):
            break
        drain(wire, wire.limits[1])
    return outcome


@compiled
def _try_once(wire: Wire, length: int, reply_length: int) -> int:
    begin_ns = monotonic_ns(wire.timespec)
    received = transact(wire, length, reply_length)
    if received < 0:
        return PORT_LOST
    if reply_length == 0:
        return OK
    outcome = take_states(
        wire.incoming,
        received,
        wire.ids,
        wire.zero_steps,
        wire.direction,
        wire.position_rad,
        wire.velocity_rad_s,
        wire.load,
        wire.status,
        wire.temperature_c,
    )
    if outcome & 15 in (OK, SERVO_FAULT):
        wire.t_ns[0] = (begin_ns + monotonic_ns(wire.timespec)) // 2
    return outcome
