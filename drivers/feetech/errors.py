"""What can go wrong between this computer and the servos: one class per thing a caller treats differently."""

from typing import ClassVar

from onbeat.drivers.feetech.tables import Status
from onbeat.embodiment.errors import OnbeatError


class BusError(OnbeatError):
    """A fault of the servo bus. `remedy` ends every message."""

    remedy: ClassVar[str] = "run `onbeat doctor`"

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: {self.remedy}")


class PortMissing(BusError):
    """The path does not exist."""

    remedy = "plug the bus adapter in, or name its port (`ls /dev/serial/by-id`)"


class PortDenied(BusError):
    """The port exists and this user may not open it."""

    remedy = "add the user to the group that owns it (`sudo usermod -aG dialout $USER`) and log in again"


class PortBusy(BusError):
    """Another process holds the port."""

    remedy = "end the other program that uses it (`fuser PORT` names it)"


class NotAServoBus(BusError):
    """The port opens and nothing behind it speaks the servo protocol."""

    remedy = "check that this is the bus adapter's port, that the servos have power, and that they are set to 1 Mbaud"


class PortEchoes(BusError):
    """What is sent comes back, and no servo's reply."""

    remedy = "switch the adapter's echo off, or check what its two lines are connected to"


class ServoMissing(BusError):
    """Some servos answer and the named ones do not."""

    remedy = "check its cable and its id (one servo at a time on the bus when an id is set)"


class PortLost(BusError):
    """The port was there and is gone: unplugged, or the twin ended."""

    remedy = "plug the adapter in again and restart"


class NoReply(BusError):
    """A servo sent nothing before the time-out, in every attempt."""

    remedy = "check its cable and power; if it is rare, raise `retries` or `timeout_ms`"


class ShortReply(BusError):
    """A reply ended before its length."""

    remedy = "check the cable and the supply voltage under load"


class BadChecksum(BusError):
    """A reply came in full with a wrong checksum."""

    remedy = "check for a loose connector and for two servos with the same id"


class WrongServo(BusError):
    """A reply came from another id than the one due."""

    remedy = "give every servo its own id, and let one program only use the bus"


class BadReply(BusError):
    """A reply has no header or another length than the one asked for."""

    remedy = "check that every servo is an STS3215 and that the baud rate is 1 Mbaud"


class GoalRefused(BusError):
    """A goal is not finite or lies outside the turn of the servo; nothing was sent."""

    remedy = "check the limits and the calibration of the joint"


class TorqueStays(BusError):
    """Torque was switched off, and some servos did not confirm that theirs is."""

    remedy = "cut the power of the servos before you go near the arm, then check cable and power"


class ServoFault(BusError):
    """A servo reports a fault of its own in a reply that is otherwise good; what it sent was stored before this.

    status: the bits that say so.
    """

    status: ClassVar[Status] = Status(0)


class ServoOverload(ServoFault):
    status = Status.OVERLOAD
    remedy = "free the joint, let it rest, then switch torque off and on"


class ServoOverheat(ServoFault):
    status = Status.TEMPERATURE
    remedy = "switch torque off and let the servo cool below its limit"


class ServoVoltage(ServoFault):
    status = Status.VOLTAGE
    remedy = "check the supply: its voltage is outside the servo's limits"


class ServoOvercurrent(ServoFault):
    status = Status.CURRENT
    remedy = "look for a jammed joint or a shorted cable, then switch torque off and on"


class ServoSensor(ServoFault):
    status = Status.SENSOR | Status.ANGLE
    remedy = "the encoder fails: replace the servo"
