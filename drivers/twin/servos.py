"""The far end of the bus: STS3215 servos as register files, bytes in, bytes and wire time out. No clock, no port.

What a servo does with a packet follows the protocol manual: a wrong checksum is ignored, a broadcast is not answered,
sync reads are answered in the order of the ids, EEPROM writes survive a power cycle only when `lock` is 0.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.packets import (
    OVERHEAD,
    RAD_PER_STEP,
    checksum,
    decode_register,
    encode_packet,
    encode_register,
    to_sign_magnitude,
)
from onbeat.drivers.feetech.tables import (
    BAUD_RATES,
    BITS_PER_BYTE,
    BROADCAST_ID,
    CENTRE_HERE,
    CENTRE_STEP,
    LOAD_FULL_SCALE,
    MEMORY_SIZE,
    REGISTER,
    REGISTERS,
    RETURN_DELAY_UNIT_NS,
    Instruction,
    Status,
)

MAX_SPEED_STEPS_S = 3400.0  # no load at 7.4 V, from the memory table's header
SILENCE_NS = 10_000_000  # a packet that pauses longer than this was given up by its sender
SUPPLY_DECIVOLT = 74
CASE_DEG_C = 32
_MOVING_STEPS_S = 20.0
_SRAM_ADDRESS = REGISTER["torque_enable"].address  # the first register that a power cycle clears
_GOAL = REGISTER["goal_position"].address, REGISTER["goal_position"].size
_LOCK_ADDRESS = REGISTER["lock"].address
_PRESENT_ADDRESS = REGISTER["present_position"].address
_STATUS_ADDRESS = REGISTER["status"].address
_MOVING_ADDRESS = REGISTER["moving"].address
_UNLOAD_ADDRESS = REGISTER["unload_condition"].address
_CURRENT_ADDRESS = REGISTER["present_current"].address
_PRESENT = struct.Struct("<HHHBB")  # position, velocity, load, voltage, temperature lie side by side
_CURRENT = struct.Struct("<H")
_WRITABLE = frozenset(r.address + k for r in REGISTERS if r.is_writable for k in range(r.size))


class Answer(NamedTuple):
    """data: what the servos send. wire_ns: how long the bus is busy with the request, the delays and the replies."""

    data: bytes
    wire_ns: int


class Motion(NamedTuple):
    """What a servo's registers say about its motion to a goal: raw steps, seconds, percent of stall, ns and 6.5 mA."""

    has_torque: bool
    lowest: int
    highest: int
    offset: int
    speed: float
    acceleration: float
    overload_percent: int
    overload_ns: int
    stall_current: int


class Servo:
    """One STS3215: its memory, what it saved, and the set point that `acceleration` and `goal_velocity` shape."""

    def __init__(self, servo_id: int) -> None:
        self.memory = bytearray(MEMORY_SIZE)
        for register in REGISTERS:
            self.put(register.name, register.default)
        self.put("id", servo_id)
        self.put("goal_position", CENTRE_STEP)
        self.injected = Status(0)
        self.case_deg_c: int | None = None  # shown in place of the truth, as is the load
        self.shown_load: float | None = None
        self.is_stuck = False  # holds where it is, whatever its goal
        self.pending: bytes | None = None
        self.setpoint_steps = float(CENTRE_STEP)
        self.setpoint_velocity = 0.0
        self.raw_steps = float(CENTRE_STEP)
        self._overload_ns = 0
        self._trip = Status(0)
        self._motion: Motion | None = None
        self._saved = bytes(self.memory[:_SRAM_ADDRESS])

    @property
    def servo_id(self) -> int:
        return self.get("id")

    def get(self, name: str) -> int:
        register = REGISTER[name]
        if register.size == 1:  # no byte has a sign
            return self.memory[register.address]
        return decode_register(name, self.read(register.address, register.size))

    def put(self, name: str, value: int) -> None:
        register = REGISTER[name]
        self._motion = None
        self.memory[register.address : register.address + register.size] = encode_register(name, value)

    def read(self, address: int, size: int) -> bytes:
        """Registers as they stand; zeros beyond the end of the memory."""
        return bytes(self.memory[address : address + size]).ljust(size, b"\0")

    def write(self, address: int, data: bytes) -> None:
        """Write what may be written; read-only bytes stay as they are."""
        for k, byte in enumerate(data, start=address):
            if k in _WRITABLE:
                self.memory[k] = byte
        if (address, len(data)) != _GOAL:
            self._motion = None
        if address <= _SRAM_ADDRESS < address + len(data):
            self._switch_torque()
        if self.memory[_LOCK_ADDRESS] == 0:
            self._saved = bytes(self.memory[:_SRAM_ADDRESS])

    def power_cycle(self) -> None:
        """Back to what the EEPROM holds; torque is off."""
        saved = self._saved
        for register in REGISTERS:
            self.put(register.name, register.default)
        self.memory[:_SRAM_ADDRESS] = saved
        self.put("torque_limit", self.get("max_torque"))
        self._overload_ns, self._trip = 0, Status(0)

    def sense(self, steps: float, steps_s: float, load: float, dt_ns: int) -> None:
        """Take over what the joint does: shaft angle and rate in raw steps, load of stall -1..1, for the last dt_ns."""
        self.raw_steps = steps
        motion = self.motion()
        if not motion.has_torque:
            self.setpoint_steps, self.setpoint_velocity = steps, 0.0
        share = min(max(load, -1.0), 1.0)
        position = to_sign_magnitude(round(steps) - motion.offset, 15)
        shown = share if self.shown_load is None else self.shown_load
        velocity, duty = to_sign_magnitude(round(steps_s), 15), to_sign_magnitude(round(shown * LOAD_FULL_SCALE), 10)
        warmth = CASE_DEG_C if self.case_deg_c is None else self.case_deg_c
        _PRESENT.pack_into(self.memory, _PRESENT_ADDRESS, position, velocity, duty, SUPPLY_DECIVOLT, warmth)
        self._judge_load(abs(share) * 100.0, dt_ns, motion)
        self.memory[_STATUS_ADDRESS] = int(self.injected | self._trip)
        self.memory[_MOVING_ADDRESS] = abs(steps_s) > _MOVING_STEPS_S
        _CURRENT.pack_into(self.memory, _CURRENT_ADDRESS, round(abs(share) * motion.stall_current))

    def advance(self, dt_ns: int) -> float:
        """Move the set point towards the goal for dt_ns; returns it in raw steps."""
        motion, dt_s = self.motion(), dt_ns * 1e-9
        if self.is_stuck:
            self.setpoint_velocity = 0.0
            return self.setpoint_steps
        goal = min(max(self.get("goal_position"), motion.lowest), motion.highest) + motion.offset
        way, speed = goal - self.setpoint_steps, motion.speed
        wanted = way / dt_s
        if motion.acceleration:  # slow down in time: v^2 = 2 a d
            speed = min(speed, (2.0 * motion.acceleration * abs(way)) ** 0.5)
            change = motion.acceleration * dt_s
            wanted = min(max(wanted, self.setpoint_velocity - change), self.setpoint_velocity + change)
        self.setpoint_velocity = min(max(wanted, -speed), speed)
        self.setpoint_steps += self.setpoint_velocity * dt_s
        return self.setpoint_steps

    def motion(self) -> "Motion":
        """The registers that shape the motion, decoded once after every write but that of a goal."""
        if self._motion is None:
            self._motion = Motion(
                has_torque=bool(self.get("torque_enable")),
                lowest=self.get("min_position"),
                highest=self.get("max_position"),
                offset=self.get("position_offset"),
                speed=min(abs(self.get("goal_velocity")) or MAX_SPEED_STEPS_S, MAX_SPEED_STEPS_S),
                acceleration=self.get("acceleration") * 100.0,
                overload_percent=self.get("overload_torque"),
                overload_ns=self.get("protection_time") * 10_000_000,
                stall_current=self.get("protection_current"),
            )
        return self._motion

    def _switch_torque(self) -> None:
        self._overload_ns, self._trip = 0, Status(0)
        if self.memory[REGISTER["torque_enable"].address] == CENTRE_HERE:
            self.put("position_offset", min(max(round(self.raw_steps) - CENTRE_STEP, -2047), 2047))
            self.put("goal_position", CENTRE_STEP)
            self.put("torque_enable", 0)

    def _judge_load(self, load_percent: float, dt_ns: int, motion: "Motion") -> None:
        """An overload that lasts trips the servo; only a new write of `torque_enable` clears that."""
        is_over = load_percent > motion.overload_percent and motion.has_torque
        self._overload_ns = self._overload_ns + dt_ns if is_over else 0
        if self._overload_ns > motion.overload_ns:
            self._trip = Status.OVERLOAD

    @property
    def holds(self) -> bool:
        """Does the motor get current: torque on, and no fault that unloads it."""
        return self.motion().has_torque and not self.memory[_STATUS_ADDRESS] & self.memory[_UNLOAD_ADDRESS]


class ServoBank:
    """All servos of one bus. on_goals is called with the goals (J,) in steps of each sync write of goal positions."""

    def __init__(self, ids: Sequence[int], on_goals: Callable[[list[int]], None] | None = None) -> None:
        self.servos = [Servo(servo_id) for servo_id in ids]
        self.counts = {"packets": 0, "bad_checksums": 0, "goal_writes": 0, "state_reads": 0}
        self._on_goals = on_goals
        self._input = bytearray()
        self._last_ns = 0

    def feed(self, data: bytes, now_ns: int = 0) -> Answer:
        """Take bytes off the wire; returns what all complete packets in it are answered with, in order."""
        if now_ns - self._last_ns > SILENCE_NS:
            self._input.clear()
        self._last_ns = now_ns
        self._input += data
        replies, wire_ns = bytearray(), 0
        while (packet := self._next_packet()) is not None:
            answers = self._obey(packet[2], packet[4], bytes(packet[5:-1]))
            replies += b"".join(reply for _, reply in answers)
            wire_ns += self._bytes_ns(len(packet)) + sum(d + self._bytes_ns(len(reply)) for d, reply in answers)
        return Answer(bytes(replies), wire_ns)

    def sense(
        self,
        position_rad: NDArray[np.float64],
        velocity_rad_s: NDArray[np.float64],
        load: NDArray[np.float64],
        dt_ns: int,
    ) -> None:
        """Show the joints' state (J,) of the last dt_ns to the servos."""
        steps = (CENTRE_STEP + position_rad / RAD_PER_STEP).tolist()
        steps_s = (velocity_rad_s / RAD_PER_STEP).tolist()
        for servo, at, rate, share in zip(self.servos, steps, steps_s, load.tolist(), strict=True):
            servo.sense(at, rate, share, dt_ns)

    def advance(self, dt_ns: int, out_rad: NDArray[np.float64]) -> None:
        """Move every set point for dt_ns; writes them, in rad, to out_rad (J,)."""
        for j, servo in enumerate(self.servos):
            out_rad[j] = (servo.advance(dt_ns) - CENTRE_STEP) * RAD_PER_STEP

    def holding(self) -> NDArray[np.bool_]:
        """Which joints' motors get current, (J,)."""
        return np.array([servo.holds for servo in self.servos])

    def _bytes_ns(self, count: int) -> int:
        baud_rate = BAUD_RATES[self.servos[0].get("baud_rate") & 7]
        return count * BITS_PER_BYTE * 1_000_000_000 // baud_rate

    def _next_packet(self) -> bytearray | None:
        """The next packet with a good checksum; what stands before it is dropped."""
        while self._find_header():
            end = self._input[3] + 4
            if len(self._input) < end:
                return None
            packet = self._input[:end]
            if end >= OVERHEAD and packet[-1] == checksum(packet[2:-1]):
                del self._input[:end]
                self.counts["packets"] += 1
                return packet
            self.counts["bad_checksums"] += 1
            del self._input[0]
        return None

    def _find_header(self) -> bool:
        """Drop bytes until a header with an id that can be stands first; False while too few are left to tell."""
        while len(self._input) >= OVERHEAD:
            start = self._input.find(b"\xff\xff")
            if start == 0 and self._input[2] <= BROADCAST_ID:
                return True
            del self._input[: start or 1 if start >= 0 else len(self._input) - 1]
        return False

    def _obey(self, target: int, instruction: int, parameters: bytes) -> list[tuple[int, bytes]]:
        """Do what a packet says; returns (delay before it in ns, reply) of each servo that answers."""
        if instruction == Instruction.SYNC_READ and len(parameters) > 2:
            return self._sync_read(parameters[0], parameters[1], parameters[2:])
        if instruction == Instruction.SYNC_WRITE and len(parameters) > 2:
            self._sync_write(parameters[0], parameters[1], parameters[2:])
            return []
        answers = []
        for servo in self.servos:
            if target not in (servo.servo_id, BROADCAST_ID):
                continue
            reply = _obey_one(servo, instruction, parameters)
            if reply is not None and target != BROADCAST_ID:
                answers.append((_delay_ns(servo), encode_packet(target, servo.get("status"), reply)))
        return answers

    def _sync_read(self, address: int, size: int, ids: bytes) -> list[tuple[int, bytes]]:
        self.counts["state_reads"] += int(address == REGISTER["present_position"].address)
        by_id = {servo.servo_id: servo for servo in self.servos}
        there = [by_id[i] for i in ids if i in by_id]
        return [(_delay_ns(s), encode_packet(s.servo_id, s.get("status"), s.read(address, size))) for s in there]

    def _sync_write(self, address: int, size: int, data: bytes) -> None:
        records = {data[k]: data[k + 1 : k + 1 + size] for k in range(0, len(data) - size, size + 1)}
        for servo in self.servos:
            if servo.servo_id in records:
                servo.write(address, records[servo.servo_id])
        goal = REGISTER["goal_position"].address
        if address <= goal < address + size:
            self.counts["goal_writes"] += 1
            if self._on_goals is not None:
                self._on_goals([servo.get("goal_position") for servo in self.servos])


def _delay_ns(servo: Servo) -> int:
    return servo.get("return_delay") * RETURN_DELAY_UNIT_NS


def _obey_one(servo: Servo, instruction: int, parameters: bytes) -> bytes | None:
    """The parameters of a servo's reply, None when it stays silent."""
    acknowledged = b"" if servo.get("response_level") else None
    if instruction == Instruction.PING:
        return b""
    if instruction == Instruction.READ and len(parameters) == 2:
        return servo.read(parameters[0], parameters[1])
    if instruction == Instruction.WRITE and len(parameters) >= 2:
        servo.write(parameters[0], parameters[1:])
        return acknowledged
    if instruction == Instruction.REG_WRITE and len(parameters) >= 2:
        servo.pending = parameters
        servo.put("write_pending", 1)
        return acknowledged
    if instruction == Instruction.ACTION:
        _run_pending(servo)
        return acknowledged
    return None


def _run_pending(servo: Servo) -> None:
    if servo.pending is not None:
        servo.write(servo.pending[0], servo.pending[1:])
    servo.pending = None
    servo.put("write_pending", 0)
