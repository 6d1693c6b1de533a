"""`FeetechBus`: the joints of an arm on one Feetech STS3215 bus. Opens the port, asks who is there, reads, writes."""

import errno
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import serial
from numpy.typing import NDArray

from onbeat.drivers.feetech import errors, protocol
from onbeat.drivers.feetech.exchange import Wire, drain, exchange_joints, transact
from onbeat.drivers.feetech.tables import (
    BROADCAST_ID,
    CENTRE_STEP,
    MAX_ID,
    MODEL_NUMBER,
    REGISTER,
    RETURN_DELAY_UNIT_NS,
    Instruction,
    Status,
)
from onbeat.drivers.interfaces import JointState
from onbeat.kernels.clock import new_timespec


@dataclass(frozen=True, slots=True)
class JointCalibration:
    """Where a joint's servo is. zero_steps: the step at 0 rad. direction: -1 when steps grow against the joint."""

    servo_id: int
    zero_steps: int = CENTRE_STEP
    direction: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.servo_id <= MAX_ID, self.servo_id
        assert self.direction in (-1, 1), self.direction


@dataclass(frozen=True, slots=True)
class BusSettings:
    """timeout_ms: of one attempt; six servos take 1.1 ms at 1 Mbaud, the rest is the adapter's and the kernel's.

    settle_ms: for how long after a fault what comes is discarded, before the next attempt. retries: after the first.
    release_on_close: torque off when the bus closes; else the arm holds its last goal.
    """

    baud_rate: int = 1_000_000
    timeout_ms: float = 20.0
    settle_ms: float = 2.0
    retries: int = 4
    release_on_close: bool = False


_ERROR_OF_FAULT: dict[int, type[errors.BusError]] = {
    protocol.NO_REPLY: errors.NoReply,
    protocol.SHORT_REPLY: errors.ShortReply,
    protocol.BAD_CHECKSUM: errors.BadChecksum,
    protocol.WRONG_SERVO: errors.WrongServo,
    protocol.BAD_REPLY: errors.BadReply,
    protocol.PORT_LOST: errors.PortLost,
    protocol.GOAL_REFUSED: errors.GoalRefused,
}
_TEXT_OF_FAULT = {
    protocol.NO_REPLY: "did not reply",
    protocol.SHORT_REPLY: "sent a reply that ends early",
    protocol.BAD_CHECKSUM: "sent a reply with a wrong checksum",
    protocol.WRONG_SERVO: "was due, and another servo's reply came",
    protocol.BAD_REPLY: "sent something that is no reply to this request",
}
# The gravest first: one error names one of them.
_SERVO_FAULTS: tuple[type[errors.ServoFault], ...] = (
    errors.ServoOverload,
    errors.ServoOverheat,
    errors.ServoOvercurrent,
    errors.ServoVoltage,
    errors.ServoSensor,
)
# What a request for the model number reads as when it is taken for its reply: its address, then its size.
ECHOED_MODEL = REGISTER["model_number"].address | REGISTER["model_number"].size << 8
_ONE_JOINT = 8  # longest register read or write of the slow path, in parameters


def open_port(path: str, baud_rate: int) -> serial.Serial:
    """Open and configure a port for this process alone. Raises PortMissing, PortDenied, PortBusy, NotAServoBus."""
    if not Path(path).exists():
        raise errors.PortMissing(f"there is no port {path}")
    try:
        return serial.Serial(path, baud_rate, timeout=0, write_timeout=0, exclusive=True)
    except serial.SerialException as fault:
        if fault.errno == errno.EACCES:
            raise errors.PortDenied(f"no permission to open {path}") from fault
        if fault.errno in (errno.EAGAIN, errno.EBUSY):
            raise errors.PortBusy(f"{path} is in use") from fault
        raise errors.NotAServoBus(f"{path} is no serial port ({fault})") from fault


def allocate_wire(fd: int, joints: Mapping[str, JointCalibration], settings: BusSettings) -> Wire:
    """The buffers of one bus, in the order of `joints`."""
    count = len(joints)
    return Wire(
        fd=fd,
        ids=np.array([joint.servo_id for joint in joints.values()], np.uint8),
        zero_steps=np.array([joint.zero_steps for joint in joints.values()], np.int64),
        direction=np.array([joint.direction for joint in joints.values()], np.int64),
        position_rad=np.zeros(count),
        velocity_rad_s=np.zeros(count),
        load=np.zeros(count),
        status=np.zeros(count, np.uint8),
        temperature_c=np.zeros(count),
        t_ns=np.zeros(1, np.int64),
        counts=np.zeros(len(protocol.FAULT_NAMES), np.int64),
        limits=np.array([settings.timeout_ms * 1e6, settings.settle_ms * 1e6, settings.retries], np.int64),
        outgoing=np.zeros(64 + 4 * count, np.uint8),
        incoming=np.zeros(256 + 16 * count, np.uint8),
        pollfd=np.zeros(2, np.int32),
        timespec=new_timespec(),
    )


class FeetechBus:
    """`Actuators` over a Feetech bus: one goal write and one read of position, velocity and load serve all joints.

    joints: name -> where its servo is, in the order of every array. Opening pings every servo; it raises NotAServoBus
    when none answers, PortEchoes when the port itself does, and ServoMissing, with joint and id, when some do not.
    return_delay_ns: (J,), of each servo, as its register said then.
    `wire` and `exchange.exchange_joints` are all that a compiled loop needs to run the bus by itself. One thread at a
    time.
    """

    def __init__(self, port: str, joints: Mapping[str, JointCalibration], settings: BusSettings | None = None) -> None:
        self.settings = settings or BusSettings()
        self.port = port
        self.joints = tuple(joints)
        self._calibration = dict(joints)
        self._no_goal = np.zeros(len(joints))
        self.return_delay_ns: tuple[int, ...] = ()
        self._serial = open_port(port, self.settings.baud_rate)
        self.wire = allocate_wire(self._serial.fileno(), joints, self.settings)
        try:
            self._check_servos()
        except BaseException:
            self._serial.close()
            raise

    def __enter__(self) -> "FeetechBus":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()

    @property
    def fd(self) -> int:
        """The open port."""
        return self.wire.fd

    @property
    def servos(self) -> tuple[JointCalibration, ...]:
        """Where each joint's servo is, in the order of `joints`."""
        return tuple(self._calibration.values())

    def faults(self) -> dict[str, int]:
        """How often each fault occurred since the bus opened, retried ones included; "ok" counts good exchanges."""
        return {name: int(n) for name, n in zip(protocol.FAULT_NAMES, self.wire.counts, strict=True)}

    def read(self, into: JointState) -> None:
        """Fill `into` with the present state. Raises BusError; on ServoFault `into` was filled before."""
        self._finish(exchange_joints(self.wire, self._no_goal, False, True), into)

    def write(self, goal_rad: NDArray[np.float64]) -> None:
        """Hand position goals (J,) in rad to the port. Raises GoalRefused (nothing sent) and PortLost."""
        self._finish(exchange_joints(self.wire, goal_rad, True, False), None)

    def exchange(self, goal_rad: NDArray[np.float64], into: JointState) -> None:
        """`write` and `read` in one burst on the wire: what a tick of the loop does."""
        self._finish(exchange_joints(self.wire, goal_rad, True, True), into)

    def enable(self, on: bool, /) -> NDArray[np.float64]:
        """Torque on or off for all joints, each confirmed by its servo; returns where they were read last.

        On: the arm holds there, (J,) rad, and none gets torque before every servo has confirmed that goal. Off:
        TorqueStays names every servo that did not confirm; all were told. Raises BusError.
        """
        if on:
            self._hold()
        else:
            self._relax()
        return self.wire.position_rad.copy()

    def ping(self, servo_id: int) -> bool:
        """Is a servo with this id there? Its own fault bits do not matter here."""
        received = self._send(protocol.encode_packet(servo_id, Instruction.PING), protocol.OVERHEAD)
        fault, _ = protocol.decode_status(bytes(self.wire.incoming[: max(received, 0)]), servo_id, 0)
        return received == 6 and fault == protocol.OK

    def read_register(self, joint: str, name: str) -> int:
        """The value of a register of one servo, signed where it has a sign. Raises BusError."""
        register = REGISTER[name]
        parameters = bytes((register.address, register.size))
        return protocol.decode_register(name, self._ask(joint, Instruction.READ, parameters, register.size))

    def write_register(self, joint: str, name: str, value: int) -> None:
        """Write a register of one servo and wait for its confirmation; EEPROM is unlocked for it and locked again."""
        register = REGISTER[name]
        assert register.is_writable, name
        if register.storage == "sram":
            self._write_one(joint, name, value)
            return
        self._write_one(joint, "lock", 0)
        self._write_one(joint, name, value)
        self._write_one(joint, "lock", 1)

    def close(self) -> None:
        """Close the port; torque stays as it is unless `release_on_close`. Closing twice is harmless."""
        if not self._serial.is_open:
            return
        try:
            if self.settings.release_on_close:
                with suppress(errors.PortLost):  # unplugged: nothing is left to release
                    self.enable(False)
        finally:
            self._serial.close()

    def _hold(self) -> None:
        self._finish(exchange_joints(self.wire, self._no_goal, False, True), None)
        self._finish(exchange_joints(self.wire, self.wire.position_rad, True, False), None)  # nobody confirms it
        for joint, servo, angle_rad in zip(self.joints, self.servos, self.wire.position_rad.tolist(), strict=True):
            steps = protocol.steps_of_rad(angle_rad, servo.zero_steps, servo.direction)
            self.write_register(joint, "goal_position", steps)
        for joint in self.joints:
            self.write_register(joint, "torque_enable", 1)

    def _relax(self) -> None:
        everyone = b"".join(bytes((servo.servo_id, 0)) for servo in self.servos)
        parameters = bytes((REGISTER["torque_enable"].address, 1)) + everyone
        for _ in range(2):  # nobody confirms it
            self._send(protocol.encode_packet(BROADCAST_ID, Instruction.SYNC_WRITE, parameters), 0)
        silent = [joint for joint in self.joints if not self._confirms_release(joint)]
        if silent:
            raise errors.TorqueStays(f"servo {self._named(silent)} on {self.port} did not confirm that torque is off")

    def _confirms_release(self, joint: str) -> bool:
        try:
            self.write_register(joint, "torque_enable", 0)
        except errors.PortLost:
            raise
        except errors.BusError:
            return False
        return True

    def _named(self, joints: Iterable[str]) -> str:
        return ", ".join(f"{self._calibration[joint].servo_id} ({joint})" for joint in joints)

    def _write_one(self, joint: str, name: str, value: int) -> None:
        self._ask(joint, Instruction.WRITE, bytes((REGISTER[name].address,)) + protocol.encode_register(name, value), 0)

    def _ask(self, joint: str, instruction: Instruction, parameters: bytes, reply_size: int) -> bytes:
        """One instruction to one servo; returns the parameters of its reply, whatever its fault bits, after retries."""
        servo_id = self._calibration[joint].servo_id
        packet = protocol.encode_packet(servo_id, instruction, parameters)
        fault = protocol.NO_REPLY
        for _ in range(1 + self.settings.retries):
            received = self._send(packet, reply_size + protocol.OVERHEAD)
            if received < 0:
                self.wire.counts[protocol.PORT_LOST] += 1
                raise self._error(protocol.PORT_LOST, joint)
            fault, reply = protocol.decode_status(bytes(self.wire.incoming[:received]), servo_id, reply_size)
            self.wire.counts[fault] += 1
            if reply is not None:
                return reply.parameters
            drain(self.wire, self.wire.limits[1])
        raise self._error(fault, joint)

    def _send(self, packet: bytes, reply_length: int) -> int:
        """How many bytes of the reply came, -1 when the port is gone."""
        self.wire.outgoing[: len(packet)] = np.frombuffer(packet, np.uint8)
        return transact(self.wire, len(packet), reply_length)

    def _finish(self, outcome: int, into: JointState | None) -> None:
        fault = outcome & 15
        if into is not None and fault in (protocol.OK, protocol.SERVO_FAULT):
            into.t_ns = int(self.wire.t_ns[0])
            into.position_rad[:] = self.wire.position_rad
            into.velocity_rad_s[:] = self.wire.velocity_rad_s
            into.load[:] = self.wire.load
        if fault != protocol.OK:
            raise self.error_of(outcome)

    def error_of(self, outcome: int) -> errors.BusError:
        """The error that an exchange's outcome, not OK, stands for."""
        return self._error(outcome & 15, self.joints[outcome >> 4])

    def _error(self, fault: int, joint: str) -> errors.BusError:
        servo = f"servo {self._named((joint,))}"
        if fault == protocol.PORT_LOST:
            return errors.PortLost(f"{self.port} is gone")
        if fault == protocol.GOAL_REFUSED:
            return errors.GoalRefused(f"the goal of {joint} is not a number or outside the turn of its servo")
        if fault == protocol.SERVO_FAULT:
            return _servo_fault(servo, Status(int(self.wire.status[self.joints.index(joint)])))
        return _ERROR_OF_FAULT[fault](f"{servo} on {self.port} {_TEXT_OF_FAULT[fault]}")

    def _check_servos(self) -> None:
        silent = [joint for joint in self.joints if not self._answers(self._calibration[joint].servo_id)]
        if len(silent) == len(self.joints):
            raise errors.NotAServoBus(f"no servo answers on {self.port}")
        if silent:
            raise errors.ServoMissing(f"no answer on {self.port} from servo {self._named(silent)}")
        for joint in self.joints:
            model = self.read_register(joint, "model_number")
            if model == ECHOED_MODEL:
                raise errors.PortEchoes(f"{self.port} gives back what is sent to it, and nothing else")
            if model != MODEL_NUMBER:
                raise errors.NotAServoBus(f"{joint} on {self.port} is a model {model}, not an STS3215 ({MODEL_NUMBER})")
        self.return_delay_ns = tuple(
            self.read_register(joint, "return_delay") * RETURN_DELAY_UNIT_NS for joint in self.joints
        )
        self._warm_up()

    def _warm_up(self) -> None:
        """One exchange, so that the first tick finds it compiled; a fault of a servo itself shows at the first read."""
        with suppress(errors.ServoFault):
            self._finish(exchange_joints(self.wire, self._no_goal, False, True), None)

    def _answers(self, servo_id: int) -> bool:
        for _ in range(1 + self.settings.retries):
            if self.ping(servo_id):
                return True
            drain(self.wire, self.wire.limits[1])
        return False


def _servo_fault(servo: str, status: Status) -> errors.ServoFault:
    for error in _SERVO_FAULTS:
        if status & error.status:
            return error(f"{servo} reports {status.name or int(status)}")
    return errors.ServoFault(f"{servo} reports status {int(status)}")
