"""What a camera's age does not show: a wrong clock, a picture that stands still, a lens that is covered."""

from collections.abc import Callable

import numpy as np
import pytest

from onbeat.drivers.interfaces import Frame
from onbeat.runtime.camera_watch import CameraWatch
from onbeat.runtime.faults import Fault
from onbeat.runtime.mailbox import StateHistory
from onbeat.runtime.safety import new_safety

FRAME_NS = 100_000_000
WATCHED = (Fault.CAMERA_CLOCK, Fault.CAMERA_FROZEN, Fault.CAMERA_BLANK)


class Camera:
    name = "top"
    frame: Frame | None = None
    on_latest: Callable[[], object] = staticmethod(lambda: None)

    def latest(self) -> Frame | None:
        self.on_latest()
        return self.frame

    def close(self) -> None: ...


class Bench:
    """One camera, an arm that moves at `speed` rad/s, and a watch over both."""

    def __init__(self, speed: float = 0.5) -> None:
        self.camera, self.safety, self.history = Camera(), new_safety(2, 0.01), StateHistory(2)
        self.watch, self.speed, self.now_ns, self.sequence = (
            CameraWatch([self.camera], self.history, self.safety),
            speed,
            10**9,
            0,
        )

    def show(self, picture: int, *, behind_ns: int = 20_000_000) -> set[Fault]:
        """A frame of that picture, captured behind_ns ago; the faults that are there after it."""
        self.sequence += 1
        self.now_ns += FRAME_NS
        self.history.append(self.now_ns, np.full(2, self.speed * self.now_ns * 1e-9))
        rgb = np.zeros((8, 8, 3), np.uint8)
        if picture:
            rgb = np.random.default_rng(picture).integers(0, 255, (8, 8, 3), np.uint8)
        self.camera.frame = Frame(self.sequence, self.now_ns - behind_ns, rgb)
        return self.look()

    def look(self) -> set[Fault]:
        self.watch.look(lambda: self.now_ns)
        return {fault for fault in WATCHED if self.safety.inputs.conditions[fault]}


def test_pictures_that_change_are_believed_and_their_age_is_told():
    bench = Bench()
    for picture in range(1, 6):
        assert bench.show(picture) == set()
    assert bench.safety.inputs.frame_ns[0] == bench.now_ns - 20_000_000


def test_no_frame_yet_is_no_fault():
    bench = Bench()
    assert bench.look() == set()
    assert bench.safety.inputs.frame_ns[0] == 0


def test_the_same_picture_is_frozen_only_when_the_arm_moved():
    still, moving = Bench(speed=0.0), Bench(speed=0.5)
    for _ in range(5):
        assert still.show(7) == set()
        frozen = moving.show(7)
    assert frozen == {Fault.CAMERA_FROZEN}
    assert moving.show(8) == set()


def test_a_black_picture_is_blank():
    bench = Bench()
    bench.show(1)
    assert Fault.CAMERA_BLANK in bench.show(0)
    assert bench.show(2) == set()


@pytest.mark.parametrize("behind_ns", [-10_000_000, -3_000_000_000])
def test_a_stamp_from_the_future_is_a_wrong_clock(behind_ns: int):
    bench = Bench()
    assert bench.show(1, behind_ns=-4_000_000) == set(), "within the tolerance"
    assert bench.show(2, behind_ns=behind_ns) == {Fault.CAMERA_CLOCK}


def test_a_frame_that_comes_while_the_watch_is_held_up_is_not_of_the_future():
    bench = Bench()
    bench.show(1)
    bench.camera.on_latest = lambda: setattr(bench, "now_ns", bench.now_ns + 40_000_000)
    assert bench.show(2, behind_ns=-30_000_000) == set(), "captured 30 ms after the look began, 10 ms before its end"


@pytest.mark.parametrize("behind_ns", [FRAME_NS + 20_000_000, 5 * FRAME_NS])
def test_a_stamp_that_stands_or_goes_back_is_a_wrong_clock(behind_ns: int):
    bench = Bench()
    bench.show(1)
    assert bench.show(2, behind_ns=behind_ns) == {Fault.CAMERA_CLOCK}


def test_looking_twice_at_one_frame_accuses_nobody():
    bench = Bench()
    bench.show(1)
    bench.speed = 50.0
    assert [bench.look() for _ in range(3)] == [set()] * 3
