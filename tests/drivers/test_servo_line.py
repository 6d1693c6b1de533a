"""The pty that stands for the wire: paced, never blocked, gone when it hangs up."""

import os
import select
import time
from collections.abc import Iterator

import pytest

from onbeat.drivers.feetech.protocol import encode_packet, reference_goals, reference_request
from onbeat.drivers.feetech.tables import Instruction
from onbeat.drivers.twin.line import ServoLine
from onbeat.drivers.twin.servos import ServoBank

pytestmark = pytest.mark.alone

PING = encode_packet(1, Instruction.PING)


def connect(line: ServoLine) -> int:
    return os.open(line.port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)


def has_input(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0.2)[0])


@pytest.fixture
def paced() -> Iterator[ServoLine]:
    bank = ServoBank(range(1, 7))
    bank.servos[0].put("baud_rate", 7)  # 38400 baud: an exchange takes 29 ms, which no busy machine hides
    line = ServoLine(bank)
    yield line
    line.close()


def serve_for(line: ServoLine, duration_s: float) -> None:
    line.serve_until(time.monotonic_ns() + round(duration_s * 1e9))


def test_a_reply_takes_the_time_of_the_wire(paced: ServoLine) -> None:
    fd = connect(paced)
    begin = time.monotonic()
    os.write(fd, reference_request([1, 2, 3, 4, 5, 6]))
    while not select.select([fd], [], [], 0)[0]:
        serve_for(paced, 0.001)
    assert time.monotonic() - begin >= (14 + 84) * 10 / 38400
    assert len(os.read(fd, 4096)) == 84
    os.close(fd)


def test_the_wire_is_busy_with_what_is_not_answered_too(paced: ServoLine) -> None:
    fd = connect(paced)
    goals = reference_goals([1, 2, 3, 4, 5, 6], [2048] * 6)
    begin = time.monotonic()
    os.write(fd, goals * 4 + PING)
    while not select.select([fd], [], [], 0)[0]:
        serve_for(paced, 0.001)
    assert time.monotonic() - begin >= (4 * len(goals) + 12) * 10 / 38400
    os.close(fd)


@pytest.mark.parametrize(("grace_ns", "stays"), [(0, False), (1_000_000, False), (3_000_000_000, True)])
def test_a_reply_due_within_the_grace_is_waited_for_and_no_other(paced: ServoLine, grace_ns: int, stays: bool) -> None:
    fd = connect(paced)
    state_of_all = reference_request([1, 2, 3, 4, 5, 6], 0, 71)
    os.write(fd, state_of_all * 2)  # 0.25 s of wire
    paced.serve_until(time.monotonic_ns(), grace_ns)
    assert bool(select.select([fd], [], [], 0)[0]) is stays
    os.close(fd)


def test_unpaced_replies_are_there_at_once() -> None:
    line = ServoLine(ServoBank(range(1, 7)), paced=False)
    fd = connect(line)
    os.write(fd, PING)
    line.serve_until(0)
    assert has_input(fd)
    assert os.read(fd, 100) == bytes.fromhex("FFFF010200FC")
    os.close(fd)
    line.close()


def test_a_client_that_never_reads_does_not_stop_the_servos() -> None:
    line = ServoLine(ServoBank(range(1, 7)), paced=False)
    fd = connect(line)
    for _ in range(400):  # 100 kB of replies, more than a pty holds
        os.write(fd, encode_packet(1, Instruction.READ, bytes((0, 250))))
        serve_for(line, 0.0005)
    line.close()
    os.close(fd)


def test_bytes_pass_as_they_are(paced: ServoLine) -> None:
    """No echo, no line discipline: 0x0D, 0x0A, 0x03 and 0x04 are data."""
    fd = connect(paced)
    os.write(fd, encode_packet(1, Instruction.WRITE, bytes((42, 0x0D, 0x0A))))
    os.write(fd, encode_packet(1, Instruction.WRITE, bytes((44, 0x03, 0x04))))
    os.write(fd, encode_packet(1, Instruction.READ, bytes((42, 4))))
    serve_for(paced, 0.05)
    replies = os.read(fd, 4096)
    assert replies[:12] == bytes.fromhex("FFFF010200FC") * 2
    assert replies[12 + 5 : -1] == bytes((0x0D, 0x0A, 0x03, 0x04))
    os.close(fd)


def test_hanging_up_twice_is_harmless(paced: ServoLine) -> None:
    fd = connect(paced)
    paced.close()
    paced.close()
    assert os.read(fd, 1) == b"", "end of file is how a client sees it"
    os.close(fd)
