"""What the runtime asks of a camera and of actuators; every driver and every fake has these and no more."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Frame:
    """One image. t_capture_ns: monotonic clock, middle of the exposure. rgb: (height, width, 3) uint8, not reused."""

    sequence: int
    t_capture_ns: int
    rgb: NDArray[np.uint8]


class Camera(Protocol):
    """A source of frames. A context manager; closing twice is harmless."""

    name: str

    def latest(self) -> Frame | None:
        """The newest complete frame, or None when none has come yet. Never blocks; the caller checks the age."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class JointState:
    """What one exchange read, J joints in the order of `Actuators.joints`. Buffers are reused: copy to keep.

    t_ns: monotonic clock, mid-exchange. position_rad, velocity_rad_s, load: (J,) float64, load -1..1 (stall).
    """

    t_ns: int
    position_rad: NDArray[np.float64]
    velocity_rad_s: NDArray[np.float64]
    load: NDArray[np.float64]


class Actuators(Protocol):
    """Joints that take position goals. A context manager whose exit leaves the robot safe (torque as configured)."""

    joints: tuple[str, ...]

    def read(self, into: JointState) -> None:
        """Fill `into` with the state. Raises a BusError of `onbeat.drivers.feetech`, or the like, on a fault."""
        ...

    def write(self, goal_rad: NDArray[np.float64]) -> None:
        """Send position goals (J,) float64 in rad; returns when they are on the wire."""
        ...

    def enable(self, on: bool, /) -> NDArray[np.float64]:
        """Torque on or off for all joints. On: they hold where they are; returns that goal, (J,) rad. Off: the last."""
        ...

    def close(self) -> None: ...
