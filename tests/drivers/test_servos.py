"""The emulated servos, byte for byte and without a port."""

import numpy as np
import pytest

from onbeat.drivers.feetech.protocol import encode_packet, encode_register, reference_goals, reference_request
from onbeat.drivers.feetech.tables import BROADCAST_ID, REGISTER, Instruction, Status
from onbeat.drivers.twin.servos import Servo, ServoBank

REST = np.zeros(6), np.zeros(6), np.zeros(6)


@pytest.fixture
def bank() -> ServoBank:
    bank = ServoBank(range(1, 7))
    bank.sense(*REST, 0)
    return bank


def write(bank: ServoBank, servo_id: int, name: str, *data: int) -> bytes:
    return bank.feed(encode_packet(servo_id, Instruction.WRITE, bytes((REGISTER[name].address, *data)))).data


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        ("FFFF010201FB", "FFFF010200FC"),
        ("FFFF0104023802BE", "FFFF0104000008F2"),
        ("FFFF01040203 02F3", "FFFF01040009 03EE"),
        ("FFFF0105032A0008C4", "FFFF010200FC"),
    ],
)
def test_answers_are_those_of_the_manual(bank: ServoBank, request_: str, reply: str) -> None:
    assert bank.feed(bytes.fromhex(request_)).data == bytes.fromhex(reply)


def test_sync_read_is_answered_in_the_order_asked(bank: ServoBank) -> None:
    data = bank.feed(reference_request([5, 2, 6])).data
    assert [data[14 * k + 2] for k in range(3)] == [5, 2, 6]


def test_sync_write_is_obeyed_and_not_answered(bank: ServoBank) -> None:
    assert bank.feed(reference_goals([2, 4], [100, 4000])).data == b""
    assert [s.get("goal_position") for s in bank.servos] == [2048, 100, 2048, 4000, 2048, 2048]


def test_goals_of_a_sync_write_are_told() -> None:
    told: list[list[int]] = []
    bank = ServoBank(range(1, 3), told.append)
    bank.feed(reference_goals([1, 2], [7, 9]))
    assert told == [[7, 9]]


def test_a_wrong_checksum_is_ignored_and_the_next_packet_is_not(bank: ServoBank) -> None:
    assert bank.feed(bytes.fromhex("FFFF010201FA FFFF020201FA")).data == bytes.fromhex("FFFF020200FB")
    assert bank.counts["bad_checksums"] == 1


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_packet_may_come_in_pieces(bank: ServoBank, cut: int) -> None:
    packet = bytes.fromhex("FFFF0104023802BE")
    assert bank.feed(packet[:cut]).data == b""
    assert bank.feed(packet[cut:]).data == bytes.fromhex("FFFF0104000008F2")


def test_noise_before_a_packet_is_skipped(bank: ServoBank) -> None:
    assert bank.feed(b"\x00\xff\x12" + bytes.fromhex("FFFF010201FB")).data == bytes.fromhex("FFFF010200FC")


@pytest.mark.parametrize("noise", ["FF", "FFFF", "FFFFFF", "00FF", "FF00FF"])
def test_noise_like_a_header_does_not_swallow_the_request(bank: ServoBank, noise: str) -> None:
    assert bank.feed(bytes.fromhex(noise + "FFFF060201F6")).data == bytes.fromhex("FFFF060200F7")


def test_half_a_packet_is_forgotten_after_a_silence(bank: ServoBank) -> None:
    bank.feed(bytes.fromhex("FFFF01FF02"), 0)
    assert bank.feed(bytes.fromhex("FFFF010201FB"), 50_000_000).data == bytes.fromhex("FFFF010200FC")


@pytest.mark.parametrize("instruction", [Instruction.WRITE, Instruction.REG_WRITE])
def test_a_broadcast_is_obeyed_in_silence(bank: ServoBank, instruction: Instruction) -> None:
    assert bank.feed(encode_packet(BROADCAST_ID, instruction, bytes((41, 7)))).data == b""
    assert bank.feed(encode_packet(BROADCAST_ID, Instruction.ACTION)).data == b""
    assert {s.get("acceleration") for s in bank.servos} == {7}


def test_a_registered_write_waits_for_action(bank: ServoBank) -> None:
    goal = bytes((REGISTER["goal_position"].address, 10, 0))
    assert bank.feed(encode_packet(1, Instruction.REG_WRITE, goal)).data == bytes.fromhex("FFFF010200FC")
    assert bank.servos[0].get("goal_position") == 2048
    assert bank.servos[0].get("write_pending") == 1
    bank.feed(encode_packet(1, Instruction.ACTION))
    assert bank.servos[0].get("goal_position") == 10
    assert bank.servos[0].get("write_pending") == 0


def test_read_only_registers_do_not_change(bank: ServoBank) -> None:
    write(bank, 1, "present_position", 1, 1)
    write(bank, 1, "model_number", 1, 1)
    assert bank.servos[0].get("present_position") == 2048
    assert bank.servos[0].get("model_number") == 777


def test_a_new_id_answers_at_once(bank: ServoBank) -> None:
    write(bank, 1, "id", 42)
    assert bank.feed(encode_packet(42, Instruction.PING)).data[2] == 42
    assert bank.feed(encode_packet(1, Instruction.PING)).data == b""


@pytest.mark.parametrize(("lock", "kept"), [(0, 16), (1, 32)])
def test_locked_eeprom_forgets(bank: ServoBank, lock: int, kept: int) -> None:
    write(bank, 1, "lock", lock)
    write(bank, 1, "position_p", 16)
    assert bank.servos[0].get("position_p") == 16
    bank.servos[0].power_cycle()
    assert bank.servos[0].get("position_p") == kept


def test_response_level_zero_acknowledges_no_write(bank: ServoBank) -> None:
    write(bank, 1, "response_level", 0)
    assert write(bank, 1, "acceleration", 1) == b""
    assert bank.feed(encode_packet(1, Instruction.PING)).data != b""


def test_wire_time_counts_bytes_and_delays(bank: ServoBank) -> None:
    assert bank.feed(reference_request([1, 2, 3, 4, 5, 6])).wire_ns == (14 + 84) * 10_000
    write(bank, 3, "return_delay", 250)
    assert bank.feed(reference_request([1, 2, 3, 4, 5, 6])).wire_ns == (14 + 84) * 10_000 + 500_000
    write(bank, 1, "baud_rate", 1)
    assert bank.feed(encode_packet(1, Instruction.PING)).wire_ns == 12 * 20_000


def test_goal_velocity_bounds_the_set_point() -> None:
    servo = Servo(1)
    servo.put("goal_velocity", 500)
    servo.put("goal_position", 3048)
    servo.put("torque_enable", 1)
    ways = np.diff([2048.0, *(servo.advance(10_000_000) for _ in range(250))])
    assert ways.max() == pytest.approx(5.0)
    assert servo.setpoint_steps == pytest.approx(3048)


def test_acceleration_ramps_up_and_down() -> None:
    servo = Servo(1)
    servo.put("acceleration", 20)
    servo.put("goal_position", 3048)
    way = np.array([2048.0, *(servo.advance(5_000_000) for _ in range(400))])
    acceleration = np.diff(way, 2) / 0.005**2
    assert acceleration.max() == pytest.approx(2000, rel=1e-6)
    assert way.max() < 3048 + 5
    assert way[-1] == pytest.approx(3048, abs=2)


def test_goals_stay_inside_the_angle_limits() -> None:
    servo = Servo(1)
    servo.put("max_position", 2100)
    servo.put("goal_position", 4000)
    for _ in range(20):
        servo.advance(100_000_000)
    assert servo.setpoint_steps == 2100


@pytest.mark.parametrize(("goal", "reached"), [(2000, 2000), (-300, 1900), (4000, 2100)])
def test_a_goal_alone_is_taken_at_once_and_as_the_other_registers_say(goal: int, reached: int) -> None:
    servo = Servo(1)
    servo.put("min_position", 1900)
    servo.put("max_position", 2100)
    servo.put("position_offset", 7)
    servo.motion()
    servo.write(REGISTER["goal_position"].address, encode_register("goal_position", goal))
    assert servo.advance(1_000_000_000) == reached + 7


def test_a_goal_with_an_acceleration_before_it_changes_both() -> None:
    servo = Servo(1)
    servo.motion()
    servo.write(REGISTER["acceleration"].address, bytes((20,)) + encode_register("goal_position", 3048))
    assert servo.advance(5_000_000) == 2048 + 2000 * 0.005**2


def test_limits_written_after_a_goal_hold_for_it() -> None:
    servo = Servo(1)
    servo.put("goal_position", 2500)
    servo.motion()
    servo.write(REGISTER["max_position"].address, encode_register("max_position", 2100))
    assert servo.advance(1_000_000_000) == 2100


def test_without_torque_the_set_point_follows_the_shaft() -> None:
    servo = Servo(1)
    servo.sense(1234.0, 0.0, 0.0, 0)
    assert servo.setpoint_steps == 1234
    assert not servo.holds


def test_centre_here_shifts_the_present_position_to_2048(bank: ServoBank) -> None:
    bank.sense(np.full(6, 0.3), np.zeros(6), np.zeros(6), 0)
    write(bank, 1, "torque_enable", 128)
    bank.sense(np.full(6, 0.3), np.zeros(6), np.zeros(6), 0)
    assert bank.servos[0].get("present_position") == 2048
    assert bank.servos[1].get("present_position") == 2244
    assert bank.servos[0].advance(1_000_000_000) == 2244


def test_a_lasting_overload_trips_the_servo_until_torque_is_written_again(bank: ServoBank) -> None:
    write(bank, 1, "torque_enable", 1)
    strain = np.array([0.9, 0, 0, 0, 0, 0])
    for _ in range(21):
        bank.sense(REST[0], REST[1], strain, 100_000_000)
    assert bank.feed(encode_packet(1, Instruction.PING)).data[4] == Status.OVERLOAD
    assert not bank.holding()[0]
    bank.sense(*REST, 100_000_000)
    assert bank.servos[0].get("status") == Status.OVERLOAD
    write(bank, 1, "torque_enable", 1)
    bank.sense(*REST, 100_000_000)
    assert bank.holding()[0]


def test_a_short_overload_does_not_trip(bank: ServoBank) -> None:
    write(bank, 1, "torque_enable", 1)
    for load in [0.9] * 15 + [0.1] + [0.9] * 15:
        bank.sense(REST[0], REST[1], np.full(6, load), 100_000_000)
    assert bank.servos[0].get("status") == 0


def test_an_injected_fault_is_reported_and_unloads_if_configured(bank: ServoBank) -> None:
    write(bank, 1, "torque_enable", 1)
    bank.servos[0].injected = Status.VOLTAGE
    bank.sense(*REST, 0)
    assert bank.servos[0].get("status") == Status.VOLTAGE
    assert bank.holding()[0], "the default unload condition leaves voltage out"
    bank.servos[0].injected = Status.TEMPERATURE
    bank.sense(*REST, 0)
    assert not bank.holding()[0]


def test_the_state_of_a_joint_is_in_the_registers(bank: ServoBank) -> None:
    bank.sense(np.full(6, -0.5), np.full(6, -1.5), np.full(6, -0.25), 0)
    servo = bank.servos[3]
    assert servo.get("present_position") == 2048 - 326
    assert servo.get("present_velocity") == -978
    assert servo.get("present_load") == -250
    assert servo.get("moving") == 1
    assert servo.get("present_voltage") == 74
