"""Packets against frames of the vendor's manual and frames summed by hand; the compiled codec against the reference."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onbeat.drivers.feetech import protocol
from onbeat.drivers.feetech.tables import BROADCAST_ID, MEMORY_SIZE, REGISTER, REGISTERS, Instruction

IDS = np.arange(1, 7, dtype=np.uint8)
ZERO = np.array([2048, 2000, 2100, 2048, 2048, 1024], np.int64)
DIRECTION = np.array([1, -1, 1, 1, -1, 1], np.int64)
STATES = np.array([[2048, 0, 0], [0, -300, 999], [4095, 300, -999], [1, 1, 1], [3000, -1, -1], [1024, 32767, 1000]])


@pytest.mark.parametrize(
    ("servo_id", "instruction", "parameters", "frame"),
    [
        (1, Instruction.PING, b"", "FF FF 01 02 01 FB"),
        (1, Instruction.READ, bytes((56, 2)), "FF FF 01 04 02 38 02 BE"),
        (1, Instruction.WRITE, bytes((42, 0, 8)), "FF FF 01 05 03 2A 00 08 C4"),
        (1, Instruction.WRITE, bytes((5, 2)), "FF FF 01 04 03 05 02 F0"),
        (BROADCAST_ID, Instruction.WRITE, bytes((55, 0)), "FF FF FE 04 03 37 00 C3"),
        (1, Instruction.WRITE, bytes((41, 50, 0xE8, 3, 0, 0, 0xE8, 3)), "FF FF 01 0A 03 29 32 E8 03 00 00 E8 03 C0"),
        (2, Instruction.WRITE, bytes((42, 0xE8, 3, 0, 0, 0, 0)), "FF FF 02 09 03 2A E8 03 00 00 00 00 DC"),
    ],
)
def test_packets_are_those_of_the_manual(servo_id: int, instruction: int, parameters: bytes, frame: str) -> None:
    assert protocol.encode_packet(servo_id, instruction, parameters) == bytes.fromhex(frame)


def test_sync_packets_are_those_summed_by_hand() -> None:
    assert protocol.reference_goals([1, 2], [2048, 1000]) == bytes.fromhex("FFFF FE 0A 83 2A 02 01 0008 02 E803 52")
    assert protocol.reference_request([1, 2, 3, 4, 5, 6]) == bytes.fromhex("FFFF FE 0A 82 38 08 010203040506 20")


@pytest.mark.parametrize(
    ("value", "bit", "raw"), [(0, 15, 0), (-1, 15, 0x8001), (300, 15, 300), (-5, 10, 0x405), (-2047, 11, 0xFFF)]
)
def test_sign_is_a_bit_of_its_own(value: int, bit: int, raw: int) -> None:
    assert protocol.to_sign_magnitude(value, bit) == raw
    assert protocol.from_sign_magnitude(raw, bit) == value


def test_minus_zero_is_zero() -> None:
    assert protocol.from_sign_magnitude(0x8000, 15) == 0


@given(st.sampled_from([10, 11, 15]), st.data())
def test_sign_magnitude_round_trip(bit: int, data: st.DataObject) -> None:
    value = data.draw(st.integers(-(2**bit) + 1, 2**bit - 1))
    assert protocol.from_sign_magnitude(protocol.to_sign_magnitude(value, bit), bit) == value


@given(st.integers(0, 4095), st.integers(0, 4095), st.sampled_from([-1, 1]))
def test_steps_survive_radians(steps: int, zero: int, direction: int) -> None:
    assert protocol.steps_of_rad(protocol.rad_of_steps(steps, zero, direction), zero, direction) == steps


def test_a_turn_is_4096_steps() -> None:
    assert protocol.steps_of_rad(math.pi / 2, 2048, 1) == 3072
    assert protocol.steps_of_rad(math.pi / 2, 2048, -1) == 1024


@given(st.sampled_from([r for r in REGISTERS if r.low is not None]), st.data())
def test_every_writable_register_round_trips(register, data: st.DataObject) -> None:
    value = data.draw(st.integers(register.low, register.high))
    assert protocol.decode_register(register.name, protocol.encode_register(register.name, value)) == value


def test_registers_do_not_overlap_and_hold_their_defaults() -> None:
    taken: set[int] = set()
    for register in REGISTERS:
        cells = set(range(register.address, register.address + register.size))
        assert not taken & cells, register
        taken |= cells
        assert register.low is None or register.high is None or register.low <= register.default <= register.high
    assert max(taken) < MEMORY_SIZE


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.integers(0, 4095), min_size=6, max_size=6))
def test_compiled_goals_equal_the_reference(steps: list[int]) -> None:
    goal = np.array([protocol.rad_of_steps(s, z, d) for s, z, d in zip(steps, ZERO, DIRECTION, strict=True)])
    out = np.zeros(64, np.uint8)
    end = protocol.put_goals(out, 3, IDS, goal, ZERO, DIRECTION)
    assert bytes(out[3:end]) == protocol.reference_goals(IDS.tolist(), steps)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_compiled_request_equals_the_reference(count: int) -> None:
    out = np.zeros(64, np.uint8)
    end = protocol.put_request(out, 0, IDS[:count], 56, 8)
    assert bytes(out[:end]) == protocol.reference_request(IDS[:count].tolist())


@pytest.mark.parametrize("goal", [math.nan, math.inf, -math.inf, 1e300, math.pi, -math.pi - 0.002])
@pytest.mark.parametrize("joint", [0, 3])
def test_a_goal_off_the_turn_is_refused(goal: float, joint: int) -> None:
    goals = np.zeros(6)
    goals[joint] = goal
    out = np.zeros(64, np.uint8)
    assert protocol.put_goals(out, 0, IDS, goals, np.full(6, 2048), np.ones(6, np.int64)) == -1 - joint


def test_the_ends_of_the_turn_are_allowed() -> None:
    goals = np.array([-math.pi, math.pi - protocol.RAD_PER_STEP, 0, 0, 0, 0])
    out = np.zeros(64, np.uint8)
    end = protocol.put_goals(out, 0, IDS, goals, np.full(6, 2048), np.ones(6, np.int64))
    assert bytes(out[:end]) == protocol.reference_goals(IDS.tolist(), [0, 4095, 2048, 2048, 2048, 2048])


def replies(states=STATES, error: int = 0) -> bytearray:
    names = ("present_position", "present_velocity", "present_load")
    blocks = [b"".join(protocol.encode_register(n, int(v)) for n, v in zip(names, row, strict=True)) for row in states]
    blocks = [block + bytes((74, 30 + j)) for j, block in enumerate(blocks)]  # 7.4 V, 30, 31, ... degC
    return bytearray(b"".join(protocol.encode_packet(i, error, block) for i, block in enumerate(blocks, start=1)))


def take(data: bytes) -> tuple[int, tuple[np.ndarray, ...]]:
    buffer = np.zeros(128, np.uint8)
    buffer[: len(data)] = np.frombuffer(bytes(data), np.uint8)
    out = (np.full(6, 9.0), np.full(6, 9.0), np.full(6, 9.0), np.full(6, 9, np.uint8), np.full(6, 9.0))
    outcome = protocol.take_states(buffer, len(data), IDS, ZERO, DIRECTION, *out)
    return outcome, out


def test_compiled_states_equal_the_reference() -> None:
    data = replies()
    outcome, (position, velocity, load, status, temperature_c) = take(data)
    assert outcome == protocol.OK
    for j in range(6):
        steps, steps_s, share, warmth = protocol.reference_state(bytes(data[14 * j + 5 : 14 * j + 13]))
        assert position[j] == pytest.approx(protocol.rad_of_steps(steps, int(ZERO[j]), int(DIRECTION[j])), abs=1e-12)
        assert velocity[j] == pytest.approx(DIRECTION[j] * steps_s * protocol.RAD_PER_STEP, abs=1e-12)
        assert load[j] == pytest.approx(DIRECTION[j] * share)
        assert temperature_c[j] == warmth == 30 + j
    assert not status.any()


def test_status_bits_are_told_after_the_states_were_stored() -> None:
    outcome, (position, _, _, status, _) = take(replies(error=32))
    assert outcome == protocol.SERVO_FAULT
    assert status.tolist() == [32] * 6
    assert position[0] == 0.0


@settings(deadline=None)
@given(st.integers(0, 83), st.integers(1, 255))
def test_no_spoilt_byte_passes(place: int, change: int) -> None:
    data = replies()
    data[place] ^= change
    outcome, out = take(data)
    assert outcome & 15 not in (protocol.OK, protocol.SERVO_FAULT)
    assert outcome >> 4 == place // 14
    assert all((array == 9).all() for array in out), "a bad block must not be stored, not even in part"


@pytest.mark.parametrize(
    ("data", "fault", "joint"),
    [
        (b"", protocol.NO_REPLY, 0),
        (replies()[:70], protocol.NO_REPLY, 5),
        (replies()[:28] + replies()[42:], protocol.NO_REPLY, 2),
        (replies()[:2], protocol.SHORT_REPLY, 0),
        (replies()[:82], protocol.SHORT_REPLY, 5),
        (replies()[:40] + replies()[42:], protocol.SHORT_REPLY, 2),
        (replies()[14:28] + replies()[:14] + replies()[28:], protocol.WRONG_SERVO, 0),
        (b"\0" + replies()[:83], protocol.BAD_REPLY, 0),
    ],
)
def test_each_fault_has_its_code_and_joint(data: bytes, fault: int, joint: int) -> None:
    assert take(data)[0] == fault + 16 * joint


@pytest.mark.parametrize(
    ("packet", "fault"),
    [
        ("", protocol.NO_REPLY),
        ("FFFF0104", protocol.SHORT_REPLY),
        ("FFFF01040000", protocol.SHORT_REPLY),
        ("FFFF010400000807", protocol.BAD_CHECKSUM),
        ("FFFF020400000800", protocol.WRONG_SERVO),
        ("FFFF010500000800", protocol.BAD_REPLY),
        ("00FF0104000008F2", protocol.BAD_REPLY),
    ],
)
def test_one_reply_is_judged_the_same_way(packet: str, fault: int) -> None:
    assert protocol.decode_status(bytes.fromhex(packet), 1, 2) == (fault, None)


def test_a_good_reply_is_taken_apart() -> None:
    fault, reply = protocol.decode_status(bytes.fromhex("FFFF0104000008F2"), 1, 2)
    assert fault == protocol.OK
    assert reply is not None
    assert protocol.decode_register("present_position", reply.parameters) == 2048


def test_state_block_is_where_the_table_says() -> None:
    assert [REGISTER[n].address for n in ("present_position", "present_velocity", "present_load")] == [56, 58, 60]
