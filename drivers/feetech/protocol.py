"""The servo protocol, pure: bytes <-> values. Compiled codec for the loop; a plain reference beside it for the tests.

Packet: FF FF, id, length, instruction (or status, in a reply), parameters, checksum. length = parameters + 2; the
checksum is the inverted low byte of the sum from id to the last parameter. Words are little-endian; a sign is a bit.

J joints, L bytes that each servo sends in a sync read. Angles are rad and steps are counted here and nowhere else.
"""

import math
from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from onbeat.drivers.feetech.tables import (
    BROADCAST_ID,
    LOAD_FULL_SCALE,
    MAX_STEP,
    REGISTER,
    STATE_ADDRESS,
    STATE_SIZE,
    STEPS_PER_TURN,
    Instruction,
)

RAD_PER_STEP: Final = 2.0 * math.pi / STEPS_PER_TURN
OVERHEAD: Final = 6  # header, id, length, instruction or status, checksum

# What is wrong with a reply. Compiled code returns these; device.py turns them into errors.
OK: Final = 0
NO_REPLY: Final = 1
SHORT_REPLY: Final = 2
BAD_CHECKSUM: Final = 3
WRONG_SERVO: Final = 4
BAD_REPLY: Final = 5
PORT_LOST: Final = 6
GOAL_REFUSED: Final = 7
SERVO_FAULT: Final = 8
LATE_REPLY: Final = 9  # counted, never returned: bytes that lay in the input before a request
FAULT_NAMES: Final = (
    "ok",
    "no_reply",
    "short_reply",
    "bad_checksum",
    "wrong_servo",
    "bad_reply",
    "port_lost",
    "goal_refused",
    "servo_fault",
    "late_reply",
)

_POSITION_SIGN: Final = 15
_VELOCITY_SIGN: Final = 15
_LOAD_SIGN: Final = 10
_GOAL_ADDRESS: Final = REGISTER["goal_position"].address
_SYNC_READ: Final = int(Instruction.SYNC_READ)
_SYNC_WRITE: Final = int(Instruction.SYNC_WRITE)


class StatusPacket(NamedTuple):
    """A servo's reply. error: bits of `tables.Status`."""

    servo_id: int
    error: int
    parameters: bytes


def checksum(body: bytes | bytearray) -> int:
    """Of everything between header and checksum."""
    return ~sum(body) & 0xFF


def encode_packet(servo_id: int, instruction: int, parameters: bytes = b"") -> bytes:
    """An instruction, or with a status byte in its place a reply."""
    body = bytes((servo_id, len(parameters) + 2, instruction)) + parameters
    return b"\xff\xff" + body + bytes((checksum(body),))


def decode_status(packet: bytes, servo_id: int, size: int) -> tuple[int, StatusPacket | None]:
    """One reply of `servo_id` with `size` parameters: a fault code, and the packet when that is OK."""
    if not packet:
        return NO_REPLY, None
    if packet[:2] != b"\xff\xff"[: len(packet)]:
        return BAD_REPLY, None
    if len(packet) >= 4 and packet[2] != servo_id:
        return WRONG_SERVO, None
    if len(packet) >= 4 and packet[3] != size + 2:
        return BAD_REPLY, None
    if len(packet) < size + OVERHEAD:
        return SHORT_REPLY, None
    if packet[-1] != checksum(packet[2:-1]):
        return BAD_CHECKSUM, None
    return OK, StatusPacket(servo_id, packet[4], packet[5:-1])


def to_sign_magnitude(value: int, sign_bit: int) -> int:
    """A signed integer as the servo stores it; |value| must be below 2**sign_bit."""
    assert abs(value) < 1 << sign_bit, (value, sign_bit)
    return abs(value) | (int(value < 0) << sign_bit)


def from_sign_magnitude(raw: int, sign_bit: int) -> int:
    """The inverse; bits above the sign are dropped. Minus zero reads as zero."""
    magnitude = raw & ((1 << sign_bit) - 1)
    return -magnitude if raw >> sign_bit & 1 else magnitude


def encode_register(name: str, value: int) -> bytes:
    """A register's value as it goes on the wire, low byte first."""
    register = REGISTER[name]
    raw = value if register.sign_bit is None else to_sign_magnitude(value, register.sign_bit)
    return raw.to_bytes(register.size, "little")


def decode_register(name: str, data: bytes) -> int:
    """The inverse of `encode_register`."""
    register = REGISTER[name]
    raw = int.from_bytes(data, "little")
    return raw if register.sign_bit is None else from_sign_magnitude(raw, register.sign_bit)


def steps_of_rad(angle_rad: float, zero_steps: int, direction: int) -> int:
    """Nearest step of an angle. zero_steps: where 0 rad lies. direction: +1 or -1."""
    return zero_steps + direction * round(angle_rad / RAD_PER_STEP)


def rad_of_steps(steps: int, zero_steps: int, direction: int) -> float:
    """The inverse of `steps_of_rad`, up to half a step."""
    return direction * (steps - zero_steps) * RAD_PER_STEP


def reference_goals(ids: list[int], steps: list[int]) -> bytes:
    """Sync write of goal positions, in plain Python."""
    data = b"".join(bytes((i,)) + encode_register("goal_position", s) for i, s in zip(ids, steps, strict=True))
    return encode_packet(BROADCAST_ID, Instruction.SYNC_WRITE, bytes((_GOAL_ADDRESS, 2)) + data)


def reference_request(ids: list[int], address: int = STATE_ADDRESS, size: int = STATE_SIZE) -> bytes:
    """Sync read request, in plain Python."""
    return encode_packet(BROADCAST_ID, Instruction.SYNC_READ, bytes((address, size, *ids)))


def reference_state(data: bytes) -> tuple[int, int, float]:
    """The six bytes of one servo: position in steps, velocity in steps/s, load of full scale."""
    position = decode_register("present_position", data[0:2])
    velocity = decode_register("present_velocity", data[2:4])
    return position, velocity, decode_register("present_load", data[4:6]) / LOAD_FULL_SCALE


@njit(cache=True, nogil=True)
def seal_packet(out: NDArray[np.uint8], start: int, parameters: int) -> int:
    """Write header, length and checksum around a packet whose id and parameters stand at `start`; returns its end."""
    out[start] = out[start + 1] = 0xFF
    out[start + 3] = parameters + 2
    end = start + parameters + OVERHEAD
    total = 0
    for k in range(start + 2, end - 1):
        total += out[k]
    out[end - 1] = ~total & 0xFF
    return end


@njit(cache=True, nogil=True)
def put_request(out: NDArray[np.uint8], start: int, ids: NDArray[np.uint8], address: int, size: int) -> int:
    """Sync read request at `start` of `out`; returns its end."""
    out[start + 2] = BROADCAST_ID
    out[start + 4] = _SYNC_READ
    out[start + 5] = address
    out[start + 6] = size
    for j in range(ids.size):
        out[start + 7 + j] = ids[j]
    return seal_packet(out, start, ids.size + 2)


@njit(cache=True, nogil=True)
def put_goals(
    out: NDArray[np.uint8],
    start: int,
    ids: NDArray[np.uint8],
    goal_rad: NDArray[np.float64],
    zero_steps: NDArray[np.int64],
    direction: NDArray[np.int64],
) -> int:
    """Sync write of goals (J,) in rad at `start` of `out`; returns its end.

    Returns -1 - j, with nothing to send, when joint j's goal is not finite or outside the servo's one turn.
    """
    out[start + 2] = BROADCAST_ID
    out[start + 4] = _SYNC_WRITE
    out[start + 5] = _GOAL_ADDRESS
    out[start + 6] = 2
    for j in range(ids.size):
        turn = np.rint(goal_rad[j] / RAD_PER_STEP)
        if not abs(turn) <= STEPS_PER_TURN:  # also true of NaN
            return -1 - j
        steps = zero_steps[j] + direction[j] * int(turn)
        if steps < 0 or steps > MAX_STEP:
            return -1 - j
        at = start + 7 + 3 * j
        out[at] = ids[j]
        out[at + 1] = steps & 0xFF
        out[at + 2] = steps >> 8
    return seal_packet(out, start, 3 * ids.size + 2)


@njit(cache=True, nogil=True)
def signed_word(data: NDArray[np.uint8], at: int, sign_bit: int) -> int:
    """A little-endian word with its sign in `sign_bit`."""
    raw = int(data[at]) | (int(data[at + 1]) << 8)
    magnitude = raw & ((1 << sign_bit) - 1)
    return -magnitude if (raw >> sign_bit) & 1 else magnitude


@njit(cache=True, nogil=True)
def reply_fault(data: NDArray[np.uint8], at: int, received: int, ids: NDArray[np.uint8], j: int, size: int) -> int:
    """What is wrong with the reply of joint j at `at`, of `received` bytes in all; OK when nothing is.

    A later servo's reply in j's place, with bytes missing in all, means that j was silent; in full it means a wrong id.
    """
    is_short = received < ids.size * (size + OVERHEAD)
    if received <= at:
        return NO_REPLY
    if received < at + 4:
        return SHORT_REPLY
    if data[at] != 0xFF or data[at + 1] != 0xFF:
        return BAD_REPLY
    if data[at + 2] != ids[j]:
        return NO_REPLY if is_short and _is_in(data[at + 2], ids, j + 1) else WRONG_SERVO
    if data[at + 3] != size + 2:
        return BAD_REPLY
    if received < at + size + OVERHEAD:
        return SHORT_REPLY
    total = 0
    for k in range(at + 2, at + size + OVERHEAD - 1):
        total += data[k]
    if data[at + size + OVERHEAD - 1] == ~total & 0xFF:
        return OK
    return SHORT_REPLY if is_short else BAD_CHECKSUM


@njit(cache=True, nogil=True)
def _is_in(servo_id: int, ids: NDArray[np.uint8], first: int) -> bool:
    return bool(np.any(ids[first:] == servo_id))


@njit(cache=True, nogil=True)
def take_states(
    data: NDArray[np.uint8],
    received: int,
    ids: NDArray[np.uint8],
    zero_steps: NDArray[np.int64],
    direction: NDArray[np.int64],
    position_rad: NDArray[np.float64],
    velocity_rad_s: NDArray[np.float64],
    load: NDArray[np.float64],
    status: NDArray[np.uint8],
) -> int:
    """Check J replies of a sync read and store them (J,); all of them or none.

    Returns OK, or fault + 16 j of the first bad reply. SERVO_FAULT + 16 j when the replies are good and were stored,
    and servo j is the first whose status byte (kept in `status`) is not zero.
    """
    for j in range(ids.size):
        fault = reply_fault(data, j * (STATE_SIZE + OVERHEAD), received, ids, j, STATE_SIZE)
        if fault != OK:
            return fault + 16 * j
    outcome = OK
    for j in range(ids.size):
        at = j * (STATE_SIZE + OVERHEAD) + 5
        position_rad[j] = direction[j] * (signed_word(data, at, _POSITION_SIGN) - zero_steps[j]) * RAD_PER_STEP
        velocity_rad_s[j] = direction[j] * signed_word(data, at + 2, _VELOCITY_SIGN) * RAD_PER_STEP
        load[j] = direction[j] * signed_word(data, at + 4, _LOAD_SIGN) / LOAD_FULL_SCALE
        status[j] = data[at - 1]
        if status[j] != 0 and outcome == OK:
            outcome = SERVO_FAULT + 16 * j
    return outcome
