"""The STS3215 as data: registers, instructions, baud codes and status bits.

Source: Feetech, STS3215 memory table version 3.6, and the SCS communication protocol manual.
"""

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, Literal

MODEL_NUMBER = 777  # registers 3 and 4 read 9 and 3
BROADCAST_ID = 0xFE
MAX_ID = 0xFD
STEPS_PER_TURN = 4096
MAX_STEP = STEPS_PER_TURN - 1
CENTRE_STEP = 2048
LOAD_FULL_SCALE = 1000  # 0.1 % of the drive's duty cycle
BAUD_RATES = (1_000_000, 500_000, 250_000, 128_000, 115_200, 76_800, 57_600, 38_400)  # by the code in `baud_rate`
RETURN_DELAY_UNIT_NS = 2_000
BITS_PER_BYTE = 10  # start, 8 data, stop
CENTRE_HERE = 128  # written to `torque_enable`: the present position becomes 2048


class Instruction(IntEnum):
    """Byte 4 of a packet to a servo."""

    PING = 0x01
    READ = 0x02
    WRITE = 0x03
    REG_WRITE = 0x04
    ACTION = 0x05
    SYNC_READ = 0x82
    SYNC_WRITE = 0x83


class Status(IntFlag):
    """Byte 4 of a reply, and the register `status`."""

    VOLTAGE = 1
    SENSOR = 2
    TEMPERATURE = 4
    CURRENT = 8
    ANGLE = 16
    OVERLOAD = 32


@dataclass(frozen=True, slots=True)
class Register:
    """One entry of the memory table. low, high: None when read only. sign_bit: place of the sign, None if unsigned."""

    name: str
    address: int
    size: int
    storage: Literal["eeprom", "sram"]
    default: int
    low: int | None
    high: int | None
    unit: str
    sign_bit: int | None = None

    @property
    def is_writable(self) -> bool:
        return self.low is not None


_ROM: Final = "eeprom"
_RAM: Final = "sram"
REGISTERS = (
    # name, address, size, storage, default, lowest, highest, unit, sign bit
    Register("firmware_major", 0, 1, _ROM, 3, None, None, "1"),
    Register("firmware_minor", 1, 1, _ROM, 6, None, None, "1"),
    Register("model_number", 3, 2, _ROM, MODEL_NUMBER, None, None, "1"),
    Register("id", 5, 1, _ROM, 1, 0, 253, "1"),
    Register("baud_rate", 6, 1, _ROM, 0, 0, 7, "code"),
    Register("return_delay", 7, 1, _ROM, 0, 0, 254, "2 us"),
    Register("response_level", 8, 1, _ROM, 1, 0, 1, "1"),
    Register("min_position", 9, 2, _ROM, 0, 0, 4094, "step"),
    Register("max_position", 11, 2, _ROM, 4095, 1, 4095, "step"),
    Register("max_temperature", 13, 1, _ROM, 70, 0, 100, "degC"),
    Register("max_voltage", 14, 1, _ROM, 80, 0, 254, "0.1 V"),
    Register("min_voltage", 15, 1, _ROM, 40, 0, 254, "0.1 V"),
    Register("max_torque", 16, 2, _ROM, 1000, 0, 1000, "0.1 %"),
    Register("phase", 18, 1, _ROM, 12, 0, 254, "bits"),
    Register("unload_condition", 19, 1, _ROM, 44, 0, 254, "bits"),
    Register("alarm_condition", 20, 1, _ROM, 47, 0, 254, "bits"),
    Register("position_p", 21, 1, _ROM, 32, 0, 254, "1"),
    Register("position_d", 22, 1, _ROM, 32, 0, 254, "1"),
    Register("position_i", 23, 1, _ROM, 0, 0, 254, "1"),
    Register("min_startup_torque", 24, 2, _ROM, 16, 0, 1000, "0.1 %"),
    Register("dead_zone_cw", 26, 1, _ROM, 1, 0, 32, "step"),
    Register("dead_zone_ccw", 27, 1, _ROM, 1, 0, 32, "step"),
    Register("protection_current", 28, 2, _ROM, 500, 0, 511, "6.5 mA"),
    Register("angular_resolution", 30, 1, _ROM, 1, 1, 100, "1"),
    Register("position_offset", 31, 2, _ROM, 0, -2047, 2047, "step", 11),
    Register("mode", 33, 1, _ROM, 0, 0, 3, "code"),
    Register("protective_torque", 34, 1, _ROM, 20, 0, 254, "%"),
    Register("protection_time", 35, 1, _ROM, 200, 0, 254, "10 ms"),
    Register("overload_torque", 36, 1, _ROM, 80, 0, 254, "%"),
    Register("velocity_p", 37, 1, _ROM, 10, 0, 254, "1"),
    Register("overcurrent_time", 38, 1, _ROM, 200, 0, 254, "10 ms"),
    Register("velocity_i", 39, 1, _ROM, 10, 0, 254, "1"),
    Register("torque_enable", 40, 1, _RAM, 0, 0, 128, "code"),
    Register("acceleration", 41, 1, _RAM, 0, 0, 254, "100 step/s^2"),
    Register("goal_position", 42, 2, _RAM, 0, -32766, 32766, "step", 15),
    Register("goal_time", 44, 2, _RAM, 0, 0, 1000, "ms"),
    Register("goal_velocity", 46, 2, _RAM, 0, -32766, 32766, "step/s", 15),
    Register("torque_limit", 48, 2, _RAM, 1000, 0, 1000, "0.1 %"),
    Register("lock", 55, 1, _RAM, 0, 0, 1, "1"),
    Register("present_position", 56, 2, _RAM, 0, None, None, "step", 15),
    Register("present_velocity", 58, 2, _RAM, 0, None, None, "step/s", 15),
    Register("present_load", 60, 2, _RAM, 0, None, None, "0.1 %", 10),
    Register("present_voltage", 62, 1, _RAM, 0, None, None, "0.1 V"),
    Register("present_temperature", 63, 1, _RAM, 0, None, None, "degC"),
    Register("write_pending", 64, 1, _RAM, 0, None, None, "1"),
    Register("status", 65, 1, _RAM, 0, None, None, "bits"),
    Register("moving", 66, 1, _RAM, 0, None, None, "1"),
    Register("present_current", 69, 2, _RAM, 0, None, None, "6.5 mA"),
)
REGISTER = {register.name: register for register in REGISTERS}
MEMORY_SIZE = 71

# What one sync read fetches: position, velocity, load, voltage and temperature lie side by side.
STATE_ADDRESS = REGISTER["present_position"].address
STATE_SIZE = 8
