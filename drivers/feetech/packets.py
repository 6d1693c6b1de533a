"""Packets of the Feetech bus in plain Python: bytes <-> values, pure. The standard library is all that it needs.

For everything that is not a tick: opening, registers, the twin's servos, the guardian; and the reference of the
compiled codec in `protocol.py`. Angles are rad and steps are counted here and there and nowhere else.
"""

import math
from typing import Final, NamedTuple

from onbeat.drivers.feetech.tables import (
    BROADCAST_ID,
    LOAD_FULL_SCALE,
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
    return encode_packet(BROADCAST_ID, Instruction.SYNC_WRITE, bytes((REGISTER["goal_position"].address, 2)) + data)


def reference_request(ids: list[int], address: int = STATE_ADDRESS, size: int = STATE_SIZE) -> bytes:
    """Sync read request, in plain Python."""
    return encode_packet(BROADCAST_ID, Instruction.SYNC_READ, bytes((address, size, *ids)))


def reference_state(data: bytes) -> tuple[int, int, float, int]:
    """One servo's state: position in steps, velocity in steps/s, load of full scale, temperature in degC."""
    position = decode_register("present_position", data[0:2])
    velocity = decode_register("present_velocity", data[2:4])
    load = decode_register("present_load", data[4:6]) / LOAD_FULL_SCALE
    return position, velocity, load, decode_register("present_temperature", data[7:8])
