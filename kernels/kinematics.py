"""Where the tool of a serial arm is, and whether a motion would take it out of its box.

L links of the chain, the first L of J joints. A position (3,) is in the base's frame, m.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onbeat.kernels.compiled import compiled
from onbeat.kernels.limit import braking_distance, braking_steps

Floats = NDArray[np.float64]

BRAKING_SAMPLES = 4  # poses on the way to rest; how far the tool gets out between them: docs/decisions/0021


class Workspace(NamedTuple):
    """offsets_m (L, 3), axes (L, 3), tool_m (3,): the chain. low_m, high_m (3,): the box that the tool must not leave.

    No links: no box. turn (3, 3), turned (3, 3), place_m (3,), pose (J,): scratch.
    """

    offsets_m: Floats
    axes: Floats
    tool_m: Floats
    low_m: Floats
    high_m: Floats
    turn: Floats
    turned: Floats
    place_m: Floats
    pose: Floats


def new_workspace(
    offsets_m: Floats, axes: Floats, tool_m: Floats, low_m: Floats, high_m: Floats, joints: int
) -> Workspace:
    """A chain in a box, with its scratch."""
    offsets_m, axes, tool_m, low_m, high_m = (
        np.ascontiguousarray(given, np.float64) for given in (offsets_m, axes, tool_m, low_m, high_m)
    )
    return Workspace(offsets_m, axes, tool_m, low_m, high_m, np.eye(3), np.eye(3), np.zeros(3), np.zeros(joints))


def no_workspace(joints: int) -> Workspace:
    """Nothing is out of it."""
    return new_workspace(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(3), np.zeros(3), np.zeros(3), joints)


def tool_reference(q: Floats, workspace: Workspace) -> Floats:
    """The tool (3,) at joint angles q (J,): the product of the joints' rotations (Rodrigues' formula)."""
    place, turn = np.zeros(3), np.eye(3)
    for angle, offset, axis in zip(q, workspace.offsets_m, workspace.axes, strict=False):
        x, y, z = axis
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        place = place + turn @ offset
        turn = turn @ (np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross)
    return place + turn @ workspace.tool_m


@compiled
def tool(q, workspace):
    """The compiled variant of `tool_reference`, into workspace.place_m."""
    turn, turned, place = workspace.turn, workspace.turned, workspace.place_m
    for r in range(3):
        place[r] = 0.0
        for c in range(3):
            turn[r, c] = 1.0 if r == c else 0.0
    for k in range(workspace.offsets_m.shape[0]):
        _carry(place, turn, workspace.offsets_m[k])
        _rotate(turn, workspace.axes[k], q[k], turned)
    _carry(place, turn, workspace.tool_m)


@compiled
def _carry(place, turn, offset):
    for r in range(3):
        place[r] += turn[r, 0] * offset[0] + turn[r, 1] * offset[1] + turn[r, 2] * offset[2]


@compiled
def _rotate(turn, axis, angle, scratch):
    """turn = turn @ rotation(axis, angle): every row of `turn` is rotated by -angle round `axis`."""
    s, c = math.sin(angle), math.cos(angle)
    x, y, z = axis[0], axis[1], axis[2]
    for r in range(3):
        a, b, d = turn[r, 0], turn[r, 1], turn[r, 2]
        along = (1.0 - c) * (a * x + b * y + d * z)
        scratch[r, 0] = c * a + s * (b * z - d * y) + along * x
        scratch[r, 1] = c * b + s * (d * x - a * z) + along * y
        scratch[r, 2] = c * d + s * (a * y - b * x) + along * z
    for r in range(3):
        for k in range(3):
            turn[r, k] = scratch[r, k]


@compiled
def excess_m(q, workspace):
    """How far the tool is out of its box (m), on the worst side; negative inside."""
    tool(q, workspace)
    place = workspace.place_m
    worst = -np.inf
    for r in range(3):
        worst = max(worst, workspace.low_m[r] - place[r], place[r] - workspace.high_m[r])
    return worst


@compiled
def leaves(q_now, q, v, a_max, dt, workspace):
    """Whether the step from q_now to (q, v), braked at a_max from there, takes the tool out, or further out.

    q_now, q, v: (J,) rad and rad/s; steps of dt. Looks at the step's end, the end of the braking and between.
    """
    if workspace.offsets_m.shape[0] == 0:
        return False
    allowed_m, most = max(0.0, excess_m(q_now, workspace)), 0
    for j in range(q.shape[0]):
        most = max(most, braking_steps(v[j], a_max[j] * dt))
    for k in range(BRAKING_SAMPLES):
        steps = math.ceil(most * k / (BRAKING_SAMPLES - 1.0))
        for j in range(q.shape[0]):
            workspace.pose[j] = q[j] + braking_distance(v[j], a_max[j] * dt, dt, steps)
        if excess_m(workspace.pose, workspace) > allowed_m:
            return True
    return False
