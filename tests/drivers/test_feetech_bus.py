"""The bus against servos on a pty: what it reads and writes, and one error for each way in which a wire fails."""

import os
import socket
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest
from numba import njit

from onbeat.drivers.feetech import errors
from onbeat.drivers.feetech.device import BusSettings, FeetechBus, JointCalibration, allocate_wire
from onbeat.drivers.feetech.exchange import Wire, exchange_joints
from onbeat.drivers.feetech.pace import BusPace, RateTooHigh
from onbeat.drivers.feetech.protocol import OK, PORT_LOST
from onbeat.drivers.feetech.tables import BROADCAST_ID, REGISTER, Instruction, Status
from onbeat.drivers.interfaces import Actuators, JointState
from onbeat.drivers.twin.servos import Answer

pytestmark = pytest.mark.alone


def replaced(change: Callable[[bytes], bytes]) -> Callable[[Answer], Answer]:
    return lambda answer: Answer(change(answer.data), answer.wire_ns)


DROP = replaced(lambda data: data[:28] + data[42:])
SILENCE = replaced(lambda data: data[:0])
CUT = replaced(lambda data: data[:-3])
FLIP = replaced(lambda data: data[:34] + bytes((data[34] ^ 4,)) + data[35:])
SWAP = replaced(lambda data: data[14:28] + data[:14] + data[28:])
NOISE = replaced(lambda data: b"\x00" + data[:-1])


def late(delay_ms: float) -> Callable[[Answer], Answer]:
    return lambda answer: Answer(answer.data, round(delay_ms * 1e6))


def test_reads_positions_in_radians(far, joints, state: JointState) -> None:
    before_ns = time.monotonic_ns()
    with FeetechBus(far.port, joints) as bus:
        bus.read(state)
    np.testing.assert_allclose(state.position_rad, np.linspace(-1.0, 1.0, 6), atol=0.5 * 2 * np.pi / 4096 + 1e-9)
    assert before_ns < state.t_ns < time.monotonic_ns()


def test_is_what_the_runtime_calls_actuators(far, joints) -> None:
    with FeetechBus(far.port, joints) as bus:
        actuators: Actuators = bus
        assert actuators.joints == tuple(joints)


def test_goals_reach_the_registers_through_the_calibration(far) -> None:
    joints = {"a": JointCalibration(1, 2048, 1), "b": JointCalibration(2, 1000, -1)}
    with FeetechBus(far.port, joints) as bus:
        pair = JointState(0, np.zeros(2), np.zeros(2), np.zeros(2))
        bus.exchange(np.array([np.pi / 2, 0.5]), pair)
    assert far.bank.servos[0].get("goal_position") == 3072
    assert far.bank.servos[1].get("goal_position") == 1000 - 326
    assert far.bank.servos[2].get("goal_position") == 2048


def test_torque_on_holds_where_the_arm_is(far, joints) -> None:
    with FeetechBus(far.port, joints) as bus:
        bus.enable(True)
        assert [bus.read_register(joint, "torque_enable") for joint in joints] == [1] * 6
        assert [s.get("goal_position") for s in far.bank.servos] == [s.get("present_position") for s in far.bank.servos]
        bus.enable(False)
    assert [s.get("torque_enable") for s in far.bank.servos] == [0] * 6


@pytest.mark.parametrize("release", [False, True])
def test_close_leaves_torque_as_configured(far, joints, release: bool) -> None:
    with FeetechBus(far.port, joints, BusSettings(release_on_close=release)) as bus:
        bus.enable(True)
    bus.close()
    assert far.bank.servos[0].get("torque_enable") == int(not release)


def test_eeprom_is_locked_again_after_a_write(far, joints) -> None:
    with FeetechBus(far.port, joints) as bus:
        bus.write_register("elbow_flex", "position_offset", -85)
        assert bus.read_register("elbow_flex", "position_offset") == -85
        assert bus.read_register("elbow_flex", "lock") == 1
    far.bank.servos[2].power_cycle()
    assert far.bank.servos[2].get("position_offset") == -85


@pytest.mark.parametrize("goal", [np.nan, np.inf, 3.3])
def test_a_bad_goal_is_refused_and_nothing_moves(far, joints, goal: float) -> None:
    with FeetechBus(far.port, joints) as bus:
        writes = far.bank.counts["goal_writes"]
        with pytest.raises(errors.GoalRefused, match="wrist_flex"):
            bus.write(np.array([0, 0, 0, goal, 0, 0]))
        bus.ping(1)
        assert far.bank.counts["goal_writes"] == writes


@pytest.mark.parametrize(
    ("spoil", "error", "named"),
    [
        (SILENCE, errors.NoReply, r"servo 1 \(shoulder_pan\)"),
        (DROP, errors.NoReply, r"servo 3 \(elbow_flex\)"),
        (CUT, errors.ShortReply, r"servo 6 \(gripper\)"),
        (FLIP, errors.BadChecksum, r"servo 3 \(elbow_flex\)"),
        (SWAP, errors.WrongServo, r"servo 1 \(shoulder_pan\)"),
        (NOISE, errors.BadReply, r"servo 1 \(shoulder_pan\)"),
    ],
)
def test_each_wire_fault_is_its_own_error(far, joints, state, once, spoil, error, named: str) -> None:
    with FeetechBus(far.port, joints, once) as bus:
        far.spoil.append(spoil)
        with pytest.raises(error, match=named) as caught:
            bus.read(state)
        assert type(caught.value) is error
        assert str(caught.value).endswith(error.remedy)
        bus.read(state)  # the line is clean again


@pytest.mark.parametrize("spoil", [SILENCE, DROP, CUT, FLIP, SWAP, NOISE])
def test_a_fault_within_the_retries_is_counted_and_not_raised(far, joints, state, spoil) -> None:
    with FeetechBus(far.port, joints, BusSettings(timeout_ms=200.0, retries=1)) as bus:
        before = bus.faults()
        far.spoil.append(spoil)
        bus.read(state)
        after = bus.faults()
    assert sum(after.values()) - sum(before.values()) == 2
    assert after["ok"] - before["ok"] == 1


def test_a_late_reply_is_never_taken_for_the_next(far, joints, state) -> None:
    with FeetechBus(far.port, joints, BusSettings(timeout_ms=150.0, settle_ms=2.0, retries=0)) as bus:
        bus.read(state)
        far.spoil.append(late(300.0))
        with pytest.raises(errors.NoReply):
            bus.read(state)
        time.sleep(0.4)
        far.bank.sense(np.full(6, 0.25), np.zeros(6), np.zeros(6), 0)
        bus.read(state)
        np.testing.assert_allclose(state.position_rad, 0.25, atol=1e-3)
        assert bus.faults()["late_reply"] == 1


def test_a_reply_that_comes_while_the_line_settles_is_drained(far, joints, state) -> None:
    def late_and_then_moved(answer: Answer) -> Answer:
        far.bank.sense(np.full(6, 0.25), np.zeros(6), np.zeros(6), 0)
        return late(250.0)(answer)

    with FeetechBus(far.port, joints, BusSettings(timeout_ms=150.0, settle_ms=300.0, retries=1)) as bus:
        far.spoil.append(late_and_then_moved)
        bus.read(state)
        np.testing.assert_allclose(state.position_rad, 0.25, atol=1e-3)
        assert bus.faults()["no_reply"] == 1
        assert bus.faults()["late_reply"] == 0


@pytest.mark.parametrize(
    ("bits", "error"),
    [
        (Status.OVERLOAD | Status.VOLTAGE, errors.ServoOverload),
        (Status.TEMPERATURE, errors.ServoOverheat),
        (Status.CURRENT, errors.ServoOvercurrent),
        (Status.VOLTAGE, errors.ServoVoltage),
        (Status.SENSOR, errors.ServoSensor),
    ],
)
def test_a_servo_in_trouble_is_named_after_its_state_was_stored(far, joints, state, bits, error) -> None:
    with FeetechBus(far.port, joints) as bus:
        far.bank.servos[4].put("status", int(bits))
        with pytest.raises(error, match=r"servo 5 \(wrist_roll\)"):
            bus.read(state)
    assert state.position_rad[5] == pytest.approx(1.0, abs=1e-3)


def test_unplugged_while_open(far, joints, state) -> None:
    with FeetechBus(far.port, joints) as bus:
        far.unplug()
        with pytest.raises(errors.PortLost, match="gone"):
            bus.read(state)
        with pytest.raises(errors.PortLost):
            bus.write(np.zeros(6))
        with pytest.raises(errors.PortLost):
            bus.read_register("gripper", "id")


def test_close_after_unplugging_is_quiet(far, joints) -> None:
    bus = FeetechBus(far.port, joints, BusSettings(release_on_close=True))
    far.unplug()
    bus.close()
    bus.close()


def test_a_port_that_is_not_there(joints) -> None:
    with pytest.raises(errors.PortMissing, match="/dev/no-such-port"):
        FeetechBus("/dev/no-such-port", joints)


@pytest.mark.parametrize("path", ["/dev/null", "/etc/hostname"])
def test_a_path_that_is_no_serial_port(joints, path: str) -> None:
    with pytest.raises(errors.NotAServoBus, match="no serial port"):
        FeetechBus(path, joints)


def test_a_port_in_use(far, joints) -> None:
    with FeetechBus(far.port, joints), pytest.raises(errors.PortBusy):
        FeetechBus(far.port, joints)


def test_a_silent_port_is_no_servo_bus(joints) -> None:
    master, slave = os.openpty()
    try:
        tty.setraw(slave)
        with pytest.raises(errors.NotAServoBus, match="no servo answers"):
            FeetechBus(os.ttyname(slave), joints, BusSettings(timeout_ms=2.0, settle_ms=1.0, retries=0))
    finally:
        os.close(master)
        os.close(slave)


def test_a_port_that_echoes_is_no_servo_bus(far, joints, monkeypatch) -> None:
    monkeypatch.setattr(far, "feed", lambda data, _now_ns: Answer(data, 0))
    with pytest.raises(errors.PortEchoes, match=r"gives back what is sent to it.*echo off"):
        FeetechBus(far.port, joints)


def test_another_servo_model_is_named(far, joints) -> None:
    far.bank.servos[2].put("model_number", 2825)
    with pytest.raises(errors.NotAServoBus, match="is a model 2825"):
        FeetechBus(far.port, joints)


def test_missing_servos_are_named(far, joints) -> None:
    joints["second_gripper"] = JointCalibration(9)
    joints["third_gripper"] = JointCalibration(11)
    with pytest.raises(errors.ServoMissing, match=r"9 \(second_gripper\), 11 \(third_gripper\)"):
        FeetechBus(far.port, joints, BusSettings(retries=0))


def test_compiled_code_can_own_the_bus(far, joints) -> None:
    with FeetechBus(far.port, joints, BusSettings(timeout_ms=2000.0)) as bus:
        assert run_ticks(bus.wire, np.full(6, 0.1), 20) == 0
        assert far.bank.counts["goal_writes"] == 20
    np.testing.assert_allclose(bus.wire.position_rad, np.linspace(-1.0, 1.0, 6), atol=1e-3)


@njit(nogil=True)
def run_ticks(wire: Wire, goal_rad: np.ndarray, ticks: int) -> int:
    outcome = 0
    for _ in range(ticks):
        outcome |= exchange_joints(wire, goal_rad, True, True)
    return outcome


def test_other_threads_run_while_the_bus_waits(far, joints, state, once) -> None:
    with FeetechBus(far.port, joints, once) as bus:
        far.spoil.append(SILENCE)
        counted, stop = [0], threading.Event()

        def count() -> None:
            while not stop.is_set():
                counted[0] += 1
                time.sleep(0.001)

        thread = threading.Thread(target=count)
        thread.start()
        before = counted[0]
        with pytest.raises(errors.NoReply):
            bus.read(state)
        seen = counted[0] - before
        stop.set()
        thread.join()
    assert seen > 10, "200 ms without an answer, and nobody else ran"


def test_a_failed_open_gives_the_port_back(far, joints) -> None:
    with pytest.raises(errors.ServoMissing):
        FeetechBus(far.port, {**joints, "x": JointCalibration(9)}, BusSettings(retries=0))
    FeetechBus(far.port, joints).close()


def losing(lost: Callable[[bytes], bool], feed: Callable[..., Answer]) -> Callable[..., Answer]:
    """A far end that never sees the packets that are `lost`."""
    return lambda data, now_ns=0: feed(b"".join(packet for packet in packets(data) if not lost(packet)), now_ns)


def packets(data: bytes) -> Iterator[bytes]:
    while data:
        end = data[3] + 4
        yield data[:end]
        data = data[end:]


def writes(name: str, *ids: int) -> Callable[[bytes], bool]:
    """Whether a packet writes a register of one of these servos, BROADCAST_ID for a sync write."""
    kinds = (Instruction.WRITE, Instruction.SYNC_WRITE)
    return lambda data: data[2] in ids and data[4] in kinds and data[5] == REGISTER[name].address


@pytest.mark.parametrize("target", [BROADCAST_ID, 4])
def test_no_torque_without_a_goal_that_arrived(far, joints, target: int, monkeypatch) -> None:
    for servo in far.bank.servos:
        servo.put("goal_position", 1000)
    monkeypatch.setattr(far, "feed", losing(writes("goal_position", target), far.feed))
    with FeetechBus(far.port, joints, BusSettings(retries=1)) as bus, suppress(errors.NoReply):
        bus.enable(True)
    torque = {s.servo_id: s.get("torque_enable") for s in far.bank.servos}
    at_rest = {s.servo_id for s in far.bank.servos if s.get("goal_position") == s.get("present_position")}
    assert {servo_id for servo_id, on in torque.items() if on} <= at_rest
    assert sum(torque.values()) == (6 if target == BROADCAST_ID else 0)


def test_an_arm_off_the_turn_of_a_servo_gets_no_torque(far) -> None:
    joints = {"a": JointCalibration(1), "b": JointCalibration(2)}
    with FeetechBus(far.port, joints) as bus:
        far.bank.servos[1].put("present_position", -3)
        with pytest.raises(errors.GoalRefused, match="of b"):
            bus.enable(True)
    assert [s.get("torque_enable") for s in far.bank.servos] == [0] * 6


def test_torque_off_reaches_all_whoever_is_silent(far, joints, monkeypatch) -> None:
    with FeetechBus(far.port, joints, BusSettings(retries=1)) as bus:
        bus.enable(True)
        monkeypatch.setattr(far, "feed", losing(writes("torque_enable", 1, 4), far.feed))
        with pytest.raises(errors.TorqueStays, match=r"servo 1 \(shoulder_pan\), 4 \(wrist_flex\).*cut the power"):
            bus.enable(False)
    assert [s.get("torque_enable") for s in far.bank.servos] == [0] * 6


def test_torque_off_is_confirmed_where_what_is_told_to_all_is_lost(far, joints, monkeypatch) -> None:
    with FeetechBus(far.port, joints, BusSettings(retries=1)) as bus:
        bus.enable(True)
        monkeypatch.setattr(far, "feed", losing(writes("torque_enable", BROADCAST_ID, 3), far.feed))
        with pytest.raises(errors.TorqueStays, match=r"servo 3 \(elbow_flex\) "):
            bus.enable(False)
    assert [s.get("torque_enable") for s in far.bank.servos] == [0, 0, 1, 0, 0, 0]


def test_return_delays_count_in_the_pace(far, joints) -> None:
    for servo in far.bank.servos[1:]:
        servo.put("return_delay", 250)
    with FeetechBus(far.port, joints) as bus:
        assert bus.return_delay_ns == (0, *(500_000,) * 5)
        with pytest.raises(
            RateTooHigh, match=r"return delays take 2500 us.*return_delay .*to 0, or loop_rate_hz to 190"
        ):
            BusPace.of(bus).check(200)


def test_a_line_that_never_falls_silent_keeps_nobody(joints) -> None:
    near, far_end = socket.socketpair()
    settings = BusSettings(timeout_ms=10.0, settle_ms=10.0, retries=0)
    stop = threading.Event()

    def babble() -> None:
        while not stop.wait(0.002):
            far_end.send(b"\x00")

    thread = threading.Thread(target=babble)
    thread.start()
    wire, took_s = allocate_wire(near.fileno(), joints, settings), list[float]()
    for _ in range(5):
        begin_s = time.monotonic()
        outcome = exchange_joints(wire, np.zeros(6), True, True)
        took_s.append(time.monotonic() - begin_s)
        assert outcome & 15 not in (OK, PORT_LOST)
    stop.set()
    thread.join()
    near.close()
    far_end.close()
    assert min(took_s[1:]) < 0.06, "20 ms; 64 bytes that are 2 ms apart take 128"
