"""The unified action space: 200 numbers that mean the same on every robot, each range with a name.

The state vector and the action vector share the ranges, except 70-76 (a mobile base) and 90-110 (a human hand's shape).
Source: the "Unified Action Space" page of the Being-H0.5 project; ranges are [start, stop).
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from onbeat.embodiment.errors import OnbeatError

UNIFIED_DIM = 200

Side = Literal["state", "action"]
BOTH: tuple[Side, ...] = ("state", "action")


class UnknownSlot(OnbeatError):
    """A name that is in no slot of that side. The text gives the closest one."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One named range [start, stop) of the unified vector. sides: the vectors (state, action) in which it exists."""

    name: str
    start: int
    stop: int
    meaning: str
    sides: tuple[Side, ...] = BOTH

    @property
    def size(self) -> int:
        return self.stop - self.start


SLOTS = (
    Slot("right_eef_position", 0, 3, "right end effector position, m; an action is a step in the world frame"),
    Slot("right_eef_rotation", 3, 6, "right end effector rotation, axis-angle, rad"),
    Slot("right_eef_reserved", 6, 9, "reserved"),
    Slot("left_eef_position", 9, 12, "left end effector position, m"),
    Slot("left_eef_rotation", 12, 15, "left end effector rotation, axis-angle, rad"),
    Slot("left_eef_reserved", 15, 18, "reserved"),
    Slot("right_gripper", 18, 19, "right gripper opening"),
    Slot("left_gripper", 19, 20, "left gripper opening"),
    Slot("right_hand", 20, 26, "right dexterous hand, six joints"),
    Slot("right_hand_reserved", 26, 32, "reserved for hands with more joints"),
    Slot("left_hand", 32, 38, "left dexterous hand, six joints"),
    Slot("left_hand_reserved", 38, 44, "reserved for hands with more joints"),
    Slot("two_finger_gripper", 44, 46, "both fingers of a parallel gripper, m"),
    Slot("reserved_46", 46, 50, "reserved"),
    Slot("right_arm_joints", 50, 57, "right arm joints, rad"),
    Slot("left_arm_joints", 57, 64, "left arm joints, rad"),
    Slot("head", 64, 66, "head pan and tilt, rad"),
    Slot("waist", 66, 69, "waist joints, rad"),
    Slot("reserved_69", 69, 70, "reserved"),
    Slot("base_position", 70, 73, "mobile base position, m", ("state",)),
    Slot("base_rotation", 73, 76, "mobile base rotation, axis-angle, rad", ("state",)),
    Slot("base_motion", 70, 74, "mobile base command", ("action",)),
    Slot("control_mode", 74, 75, "1 where the base moves, 0 where the arm moves", ("action",)),
    Slot("reserved_75", 75, 76, "reserved", ("action",)),
    Slot("reserved_76", 76, 90, "reserved"),
    Slot("right_hand_shape", 90, 100, "human right hand shape, MANO beta", ("state",)),
    Slot("left_hand_shape", 100, 110, "human left hand shape, MANO beta", ("state",)),
    Slot("right_hand_articulation", 110, 155, "human right hand, 15 joints x axis-angle, MANO theta, rad"),
    Slot("left_hand_articulation", 155, 200, "human left hand, 15 joints x axis-angle, MANO theta, rad"),
)


def find_slot(name: str, side: Side) -> Slot:
    """The slot called `name` in the state or the action vector. Raises UnknownSlot with the closest name."""
    candidates = {slot.name: slot for slot in SLOTS if side in slot.sides}
    if name in candidates:
        return candidates[name]
    raise UnknownSlot(f"unknown {side} slot '{name}': {suggest(name, candidates)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error about a misspelt name: the closest known one, or all of them when none is close."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(names)}"
