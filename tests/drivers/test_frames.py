"""Frames through shared memory: complete, stamped, never torn, gone when the writer closes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from onbeat.drivers.interfaces import Camera
from onbeat.drivers.twin.frames import (
    SHARED_MEMORY,
    FramesMissing,
    FrameWriter,
    RingReader,
    RingWriter,
    SharedFrameCamera,
)

NAME = f"onbeat-test-{os.getpid()}"


@pytest.fixture
def writer() -> Iterator[FrameWriter]:
    writer = FrameWriter(NAME, 6, 10)
    yield writer
    writer.close()


def picture(value: int) -> np.ndarray:
    return np.full((6, 10, 3), value, np.uint8)


@pytest.mark.usefixtures("writer")
def test_nothing_yet_is_none() -> None:
    with SharedFrameCamera(NAME, "top") as camera:
        assert camera.latest() is None


def test_the_newest_frame_comes_with_its_stamp(writer: FrameWriter) -> None:
    with SharedFrameCamera(NAME, "top") as camera:
        protocol: Camera = camera
        assert protocol.name == "top"
        for value in range(1, 8):
            writer.publish(picture(value), value * 1000)
        frame = camera.latest()
    assert frame is not None
    assert (frame.sequence, frame.t_capture_ns, frame.rgb.shape) == (7, 7000, (6, 10, 3))
    assert (frame.rgb == 7).all()


def test_a_frame_is_not_reused(writer: FrameWriter) -> None:
    with SharedFrameCamera(NAME, "top") as camera:
        writer.publish(picture(1), 1)
        first = camera.latest()
        assert camera.latest() is first
        for value in range(2, 12):
            writer.publish(picture(value), value)
        assert camera.latest() is not first
    assert first is not None
    assert (first.rgb == 1).all()


def test_rows_and_columns_keep_their_places(writer: FrameWriter) -> None:
    rgb = np.arange(180, dtype=np.uint8).reshape(6, 10, 3)
    writer.publish(rgb, 5)
    with SharedFrameCamera(NAME, "top") as camera:
        frame = camera.latest()
    assert frame is not None
    np.testing.assert_array_equal(frame.rgb, rgb)


@pytest.mark.parametrize("word", [0, 3])
def test_a_slot_being_written_is_never_taken(word: int) -> None:
    ring = RingWriter(NAME, 8)
    try:
        ring.publish(np.arange(8, dtype=np.uint8), 1)
        reader = RingReader(NAME)
        assert reader.latest() is not None
        assert ring._ring is not None
        ring._ring.words[1][word] += 1  # guard left odd, or pixels that do not match their checksum
        assert reader.latest() is None
    finally:
        ring.close()


WRITE_FOR_EVER = f"""
import numpy as np
from onbeat.drivers.twin.frames import RingWriter
ring, value = RingWriter('{NAME}', 40000), 0
while True:
    value = (value + 1) % 256
    ring.publish(np.full(40000, value, np.uint8), value)
"""


def test_no_torn_frame_from_a_fast_writer() -> None:
    with subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER]) as writer:
        try:
            reader, values = wait_for_ring(), set()
            give_up = time.monotonic() + 30
            while len(values) < 50 and time.monotonic() < give_up:
                taken = reader.latest()
                if taken is not None:
                    values.add(taken.t_ns)
                    assert (taken.payload == taken.t_ns).all()
        finally:
            writer.kill()
            (SHARED_MEMORY / NAME).unlink(missing_ok=True)
    assert len(values) == 50


def wait_for_ring() -> RingReader:
    for _ in range(1000):
        try:
            reader = RingReader(NAME)
        except FramesMissing:
            time.sleep(0.01)
            continue
        if reader.newest:
            return reader
    raise TimeoutError


def test_closing_unlinks_and_readers_keep_their_map(writer: FrameWriter) -> None:
    writer.publish(picture(3), 3)
    camera = SharedFrameCamera(NAME, "top")
    writer.close()
    writer.close()
    assert not (SHARED_MEMORY / NAME).exists()
    frame = camera.latest()
    assert frame is not None
    assert (frame.rgb == 3).all()
    camera.close()
    camera.close()


@pytest.mark.usefixtures("writer")
def test_a_reader_that_dies_leaves_the_ring() -> None:
    code = f"from onbeat.drivers.twin.frames import RingReader; import os; RingReader('{NAME}'); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (SHARED_MEMORY / NAME).exists()


@pytest.mark.parametrize("content", [None, b"", b"short", b"x" * 200])
def test_what_is_no_ring_is_refused(content: bytes | None) -> None:
    path = SHARED_MEMORY / f"{NAME}-none"
    if content is not None:
        path.write_bytes(content)
    try:
        with pytest.raises(FramesMissing, match=r"what fills (it|them)"):
            SharedFrameCamera(path.name, "top")
    finally:
        path.unlink(missing_ok=True)


def test_the_runtime_side_needs_no_simulator() -> None:
    code = "import sys, onbeat.drivers.twin.frames, onbeat.drivers.twin.client, onbeat.drivers.twin.records, "
    code += "onbeat.drivers.feetech.device; sys.exit('mujoco' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
