"""The servo protocol, pure: bytes <-> values. The compiled codec of the loop; `packets.py` has the plain one.

Packet: FF FF, id, length, instruction (or status, in a reply), parameters, checksum. length = parameters + 2; the
checksum is the inverted low byte of the sum from id to the last parameter. Words are little-endian; a sign is a bit.

J joints, L bytes that each servo sends in a sync read. Angles are rad and steps are counted here and nowhere else.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.packets import (
    BAD_CHECKSUM,
    BAD_REPLY,
    FAULT_NAMES,
    GOAL_REFUSED,
    LATE_REPLY,
    NO_REPLY,
    OK,
    OVERHEAD,
    PORT_LOST,
    RAD_PER_STEP,
    SERVO_FAULT,
    SHORT_REPLY,
    WRONG_SERVO,
    StatusPacket,
    checksum,
    decode_register,
    decode_status,
    encode_packet,
    encode_register,
    from_sign_magnitude,
    rad_of_steps,
    reference_goals,
    reference_request,
    reference_state,
    steps_of_rad,
    to_sign_magnitude,
)
from onbeat.drivers.feetech.tables import (
    BROADCAST_ID,
    LOAD_FULL_SCALE,
    MAX_STEP,
    REGISTER,
    STATE_SIZE,
    STEPS_PER_TURN,
    Instruction,
)
from onbeat.kernels.compiled import compiled

__all__ = [
    "BAD_CHECKSUM",
    "BAD_REPLY",
    "FAULT_NAMES",
    "GOAL_REFUSED",
    "LATE_REPLY",
    "NO_REPLY",
    "OK",
    "OVERHEAD",
    "PORT_LOST",
    "RAD_PER_STEP",
    "SERVO_FAULT",
    "SHORT_REPLY",
    "WRONG_SERVO",
    "StatusPacket",
    "checksum",
    "decode_register",
    "decode_status",
    "encode_packet",
    "encode_register",
    "from_sign_magnitude",
    "put_goals",
    "put_request",
    "rad_of_steps",
    "reference_goals",
    "reference_request",
    "reference_state",
    "reply_fault",
    "seal_packet",
    "signed_word",
    "steps_of_rad",
    "take_states",
    "to_sign_magnitude",
]

_POSITION_SIGN: Final = 15
_VELOCITY_SIGN: Final = 15
_LOAD_SIGN: Final = 10
_GOAL_ADDRESS: Final = REGISTER["goal_position"].address
_SYNC_READ: Final = int(Instruction.SYNC_READ)
_SYNC_WRITE: Final = int(Instruction.SYNC_WRITE)


@compiled
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


@compiled
def put_request(out: NDArray[np.uint8], start: int, ids: NDArray[np.uint8], address: int, size: int) -> int:
    """Sync read request at `start` of `out`; returns its end."""
    out[start + 2] = BROADCAST_ID
    out[start + 4] = _SYNC_READ
    out[start + 5] = address
    out[start + 6] = size
    for j in range(ids.size):
        out[start + 7 + j] = ids[j]
    return seal_packet(out, start, ids.size + 2)


@compiled
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


@compiled
def signed_word(data: NDArray[np.uint8], at: int, sign_bit: int) -> int:
    """A little-endian word with its sign in `sign_bit`."""
    raw = int(data[at]) | (int(data[at + 1]) << 8)
    magnitude = raw & ((1 << sign_bit) - 1)
    return -magnitude if (raw >> sign_bit) & 1 else magnitude


@compiled
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


@compiled
def _is_in(servo_id: int, ids: NDArray[np.uint8], first: int) -> bool:
    for k in range(first, ids.size):  # noqa: SIM110  compiled: any() of a generator is not
        if ids[k] == servo_id:
            return True
    return False


@compiled
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
    temperature_c: NDArray[np.float64],
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
        temperature_c[j] = data[at + STATE_SIZE - 1]
        status[j] = data[at - 1]
        if status[j] != 0 and outcome == OK:
            outcome = SERVO_FAULT + 16 * j
    return outcome
