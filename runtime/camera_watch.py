"""Whether the cameras can be believed: looked at 20 times a second, in a thread of its own, whatever the policy does.

The age of the newest frame is the tick's affair; here is what an age does not show.
"""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.interfaces import Camera, Frame
from onbeat.runtime.faults import Fault
from onbeat.runtime.mailbox import StateHistory
from onbeat.runtime.safety import Safety, set_condition

WATCH_PERIOD_S = 0.05
CLOCK_TOLERANCE_NS = 5_000_000  # of a stamp that lies in the future
FROZEN_AFTER_RAD = 0.05  # an arm that moved this far changes the picture of every camera that sees it
LEAST_CONTRAST = 2.0  # standard deviation of 8-bit pixels; a dark scene has 5, a covered lens below 1


@dataclass(slots=True)
class View:
    """What is known of one camera. still_since: the joints (J,) when its picture last changed."""

    frame: Frame | None = None
    check: int = 0
    still_since: NDArray[np.float64] | None = None
    faults: set[Fault] = field(default_factory=set)

    def take(self, frame: Frame, now_ns: int, position_rad: NDArray[np.float64]) -> None:
        """Judge a frame that is not the last one. position_rad: (J,), when it was captured."""
        before, check = self.frame, zlib.crc32(np.ascontiguousarray(frame.rgb).data)
        if check != self.check or self.still_since is None:
            self.still_since = position_rad.copy()
        self.frame, self.check = frame, check
        found = {
            Fault.CAMERA_CLOCK: _has_wrong_clock(frame, before, now_ns),
            Fault.CAMERA_FROZEN: np.abs(position_rad - self.still_since).max() > FROZEN_AFTER_RAD,
            Fault.CAMERA_BLANK: frame.rgb.std() < LEAST_CONTRAST,
        }
        self.faults = {fault for fault, is_there in found.items() if is_there}


def _has_wrong_clock(frame: Frame, before: Frame | None, now_ns: int) -> bool:
    if frame.t_capture_ns > now_ns + CLOCK_TOLERANCE_NS:
        return True
    return before is not None and frame.sequence != before.sequence and frame.t_capture_ns <= before.t_capture_ns


class CameraWatch:
    """Tells the machine of a run what the cameras of that run are worth. One thread calls `look`."""

    def __init__(self, cameras: Sequence[Camera], history: StateHistory, safety: Safety) -> None:
        """history: of the joints, for the arm must have moved between two frames that are the same."""
        self._cameras, self._history, self._safety = cameras, history, safety
        self._views = [View() for _ in cameras]

    def look(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """Judge what has come since the last look. clock: monotonic ns, read after each frame.

        Read before, a thread that is held up in between would find frames of the future.
        """
        for camera, view in zip(self._cameras, self._views, strict=True):
            frame = camera.latest()
            position_rad = None if frame is None else self._history.at(frame.t_capture_ns)
            if frame is not None and position_rad is not None and frame is not view.frame:
                view.take(frame, clock(), position_rad)
        for fault in (Fault.CAMERA_CLOCK, Fault.CAMERA_FROZEN, Fault.CAMERA_BLANK):
            set_condition(self._safety, fault, any(fault in view.faults for view in self._views))
        stamps = [0 if view.frame is None else view.frame.t_capture_ns for view in self._views]
        self._safety.inputs.frame_ns[0] = min(stamps, default=0)
