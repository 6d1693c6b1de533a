"""The vendor's own client against the twin's servos: what it can do with a real bus it can do here."""

from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.alone

scservo_sdk = pytest.importorskip("scservo_sdk")
from onbeat.drivers.feetech.tables import REGISTER  # noqa: E402

GOAL, PRESENT = REGISTER["goal_position"].address, REGISTER["present_position"].address


@pytest.fixture
def port(far) -> Iterator:
    handler = scservo_sdk.PortHandler(far.port)
    assert handler.openPort()
    yield handler
    handler.closePort()


@pytest.fixture
def packets():
    return scservo_sdk.PacketHandler(0)


@pytest.mark.parametrize("servo_id", [1, 6])
def test_ping_names_the_model(port, packets, servo_id: int) -> None:
    assert packets.ping(port, servo_id) == (777, scservo_sdk.COMM_SUCCESS, 0)


def test_ping_of_nobody_times_out(port, packets) -> None:
    _, result, _ = packets.ping(port, 9)
    assert result == scservo_sdk.COMM_RX_TIMEOUT


def test_read_and_write_of_registers(far, port, packets) -> None:
    assert packets.write1ByteTxRx(port, 2, REGISTER["acceleration"].address, 50) == (scservo_sdk.COMM_SUCCESS, 0)
    assert packets.read1ByteTxRx(port, 2, REGISTER["acceleration"].address) == (50, scservo_sdk.COMM_SUCCESS, 0)
    assert packets.write2ByteTxRx(port, 2, GOAL, 3000)[0] == scservo_sdk.COMM_SUCCESS
    assert packets.read2ByteTxRx(port, 2, GOAL)[0] == 3000
    assert far.bank.servos[1].get("goal_position") == 3000
    assert packets.read2ByteTxRx(port, 1, PRESENT)[0] == far.bank.servos[0].get("present_position")


def test_registered_write_and_action(far, port, packets) -> None:
    assert packets.regWriteTxRx(port, 1, GOAL, 2, [0xE8, 3])[0] == scservo_sdk.COMM_SUCCESS
    assert far.bank.servos[0].get("goal_position") == 2048
    assert packets.action(port, 1) == scservo_sdk.COMM_SUCCESS
    assert far.bank.servos[0].get("goal_position") == 1000


def test_sync_write(far, port, packets) -> None:
    group = scservo_sdk.GroupSyncWrite(port, packets, GOAL, 2)
    for servo_id in range(1, 7):
        assert group.addParam(servo_id, [servo_id, 8])
    assert group.txPacket() == scservo_sdk.COMM_SUCCESS
    assert packets.read2ByteTxRx(port, 6, GOAL)[0] == 2054
    assert [servo.get("goal_position") for servo in far.bank.servos] == [2049, 2050, 2051, 2052, 2053, 2054]


def test_sync_read(far, port, packets) -> None:
    group = scservo_sdk.GroupSyncRead(port, packets, PRESENT, 6)
    for servo_id in range(1, 7):
        group.addParam(servo_id)
    assert group.txRxPacket() == scservo_sdk.COMM_SUCCESS
    positions = [group.getData(servo_id, PRESENT, 2) for servo_id in range(1, 7)]
    assert positions == [servo.get("present_position") for servo in far.bank.servos]


def test_a_servo_fault_reaches_the_vendor_too(far, port, packets) -> None:
    far.bank.servos[0].put("status", 32)
    assert packets.read2ByteTxRx(port, 1, PRESENT)[2] == 32
