"""`FakeBus`: the interface of `FeetechBus` without a wire. Deterministic: a joint moves by a fixed step per read."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.errors import GoalRefused, ServoFault
from onbeat.drivers.interfaces import JointState


class FakeBus:
    """Joints that follow their goals. step_rad: how far a joint moves per read. clock: stamps, monotonic ns.

    fault: raised once by the next read or write, then forgotten; a ServoFault by the next read, which fills its state
    before, as on the bus. goals: every goal written, copies of (J,).
    """

    def __init__(
        self, joints: Sequence[str], step_rad: float = 0.05, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.joints = tuple(joints)
        self.step_rad = step_rad
        self.is_enabled = False
        self.is_open = True
        self.fault: Exception | None = None
        self.goals: list[NDArray[np.float64]] = []
        self.position_rad = np.zeros(len(self.joints))
        self._goal_rad = np.zeros(len(self.joints))
        self._clock = clock
        self._exchanges = 0

    def __enter__(self) -> "FakeBus":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()

    def read(self, into: JointState) -> None:
        """Move one step, then fill `into`; velocity is that step per read, load the part of it that was cut off."""
        self._raise_fault()
        wanted = self._goal_rad - self.position_rad if self.is_enabled else np.zeros(len(self.joints))
        moved = np.clip(wanted, -self.step_rad, self.step_rad)
        self.position_rad += moved
        into.t_ns = self._clock()
        into.position_rad[:] = self.position_rad
        into.velocity_rad_s[:] = moved
        into.load[:] = np.clip(wanted - moved, -1.0, 1.0)
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault

    def write(self, goal_rad: NDArray[np.float64]) -> None:
        """Take goals (J,) in rad. Raises GoalRefused, as the bus does, outside one turn or when not finite."""
        self._raise_fault()
        for joint, goal in zip(self.joints, goal_rad, strict=True):
            if not abs(goal) <= np.pi:
                raise GoalRefused(f"the goal of {joint} is not a number or outside the turn of its servo")
        self._goal_rad[:] = goal_rad
        self.goals.append(goal_rad.copy())

    def exchange(self, goal_rad: NDArray[np.float64], into: JointState) -> None:
        """`write`, then `read`."""
        self.write(goal_rad)
        self.read(into)

    def faults(self) -> dict[str, int]:
        """Exchanges that went well; there is no wire to fail."""
        return {"ok": self._exchanges}

    def enable(self, on: bool, /) -> NDArray[np.float64]:
        """Torque on, holding where the joints are, or off; returns where that is."""
        self._raise_fault()
        if on:
            self._goal_rad[:] = self.position_rad
        self.is_enabled = on
        return self.position_rad.copy()

    def close(self) -> None:
        """Closing twice is harmless."""
        self.is_open = False

    def _raise_fault(self) -> None:
        if self.fault is not None and not isinstance(self.fault, ServoFault):
            fault, self.fault = self.fault, None
            raise fault
        self._exchanges += 1
