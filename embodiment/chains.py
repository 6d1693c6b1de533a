"""Where a robot's tool is, as data: joint after joint from the base, all frames aligned at zero joint angles.

Source of the SO-101's numbers: TheRobotStudio/SO-ARM100, Simulation/SO101/so101_new_calib.xml, as in the twin's scene.
"""

from dataclasses import dataclass

Vector = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Link:
    """A joint. offset_m: from the joint before, in that one's frame. axis: unit, a positive angle turns round it."""

    joint: str
    offset_m: Vector
    axis: Vector


@dataclass(frozen=True, slots=True)
class Chain:
    """Links from the base, x forward, y left, z up, z = 0 on the table; tool_m: the tool in the last joint's frame."""

    links: tuple[Link, ...]
    tool_m: Vector


CHAINS = {
    "so101": Chain(
        links=(
            Link("shoulder_pan", (0.0388353, 0.0, 0.0624), (0.0, 0.0, -1.0)),
            Link("shoulder_lift", (0.0303992, 0.0, 0.0542), (0.0, 1.0, 0.0)),
            Link("elbow_flex", (0.0280, 0.0, 0.11257), (0.0, 1.0, 0.0)),
            Link("wrist_flex", (0.1349, 0.0, 0.0052), (0.0, 1.0, 0.0)),
            Link("wrist_roll", (0.0611, 0.0, 0.0), (-1.0, 0.0, 0.0)),
        ),
        tool_m=(0.0920, 0.0, 0.0046),  # between the jaws
    )
}
