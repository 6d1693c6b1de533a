"""Rotations between the forms in which robots report them, vectorised over leading axes.

A form is a name; `R` below is the rotation matrix that takes body coordinates to the parent frame:

    axis_angle       (3,)  unit axis times angle in rad
    quaternion_wxyz  (4,)  real part first
    quaternion_xyzw  (4,)  real part last
    euler_rpy        (3,)  roll, pitch, yaw with R = Rx(roll) Ry(pitch) Rz(yaw), as the published data means it
    euler_ypr        (3,)  yaw, pitch, roll with R = Rz(yaw) Ry(pitch) Rx(roll)
    rotation_6d      (6,)  the first two rows of R (arXiv 1812.07035); orthonormalised when read

Arithmetic is in the input's own float type. Angles come out with |angle| <= pi. At the pole of the Euler forms
(|pitch| = pi/2) the split between roll and yaw is arbitrary.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

AXIS_ANGLE = "axis_angle"
SMALL_ANGLE = 1e-6  # rad; below it sin(x / 2) / x is 1/2 to the last bit of a double


def convert_rotation(rotation: Array, source: str, target: str) -> Array:
    """Rewrite rotations (..., d_source) as (..., d_target). The same form comes back untouched, whatever its angle."""
    if source == target:
        return rotation
    return _WRITERS[target](_READERS[source](rotation))


def _matrix_from_wxyz(quaternion: Array) -> Array:
    w, x, y, z = np.moveaxis(quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _wxyz_from_matrix(matrix: Array) -> Array:
    """Real part not negative. Of four ways to read it, the one with the largest pivot (Shepperd 1978)."""
    m = matrix
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    squares = np.stack([1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz], axis=-1)
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    products = np.stack(
        [
            np.stack([squares[..., 0], wx, wy, wz], axis=-1),
            np.stack([wx, squares[..., 1], xy, xz], axis=-1),
            np.stack([wy, xy, squares[..., 2], yz], axis=-1),
            np.stack([wz, xz, yz, squares[..., 3]], axis=-1),
        ],
        axis=-2,
    )
    pivot = np.argmax(squares, axis=-1)[..., None]
    row = np.take_along_axis(products, pivot[..., None], axis=-2)[..., 0, :]
    quaternion = row / (2 * np.sqrt(np.take_along_axis(squares, pivot, axis=-1)))
    return np.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def _matrix_from_axis_angle(axis_angle: Array) -> Array:
    angle = np.linalg.norm(axis_angle, axis=-1, keepdims=True)
    safe = np.where(angle < SMALL_ANGLE, angle.dtype.type(1), angle)
    half_sinc = np.where(angle < SMALL_ANGLE, angle.dtype.type(0.5), np.sin(safe / 2) / safe)
    return _matrix_from_wxyz(np.concatenate([np.cos(angle / 2), axis_angle * half_sinc], axis=-1))


def _axis_angle_from_matrix(matrix: Array) -> Array:
    quaternion = _wxyz_from_matrix(matrix)
    sine = np.linalg.norm(quaternion[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, quaternion[..., :1])
    safe = np.where(angle < SMALL_ANGLE, angle.dtype.type(1), angle)
    half_sinc = np.where(angle < SMALL_ANGLE, angle.dtype.type(0.5), np.sin(safe / 2) / safe)
    return quaternion[..., 1:] / half_sinc


def _turn(axis: int, angle: Array) -> Array:
    """Rotation matrices (..., 3, 3) by `angle` (...) about a coordinate axis."""
    matrix = np.zeros((*angle.shape, 3, 3), angle.dtype)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[..., axis, axis] = 1
    matrix[..., i, i] = matrix[..., j, j] = np.cos(angle)
    matrix[..., i, j], matrix[..., j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def _matrix_from_rpy(rpy: Array) -> Array:
    return _turn(0, rpy[..., 0]) @ _turn(1, rpy[..., 1]) @ _turn(2, rpy[..., 2])


def _rpy_from_matrix(m: Array) -> Array:
    roll = np.arctan2(-m[..., 1, 2], m[..., 2, 2])
    pitch = np.arcsin(np.clip(m[..., 0, 2], -1, 1))
    yaw = np.arctan2(-m[..., 0, 1], m[..., 0, 0])
    return np.stack([roll, pitch, yaw], axis=-1)


def _matrix_from_ypr(ypr: Array) -> Array:
    return _turn(2, ypr[..., 0]) @ _turn(1, ypr[..., 1]) @ _turn(0, ypr[..., 2])


def _ypr_from_matrix(m: Array) -> Array:
    yaw = np.arctan2(m[..., 1, 0], m[..., 0, 0])
    pitch = np.arcsin(np.clip(-m[..., 2, 0], -1, 1))
    roll = np.arctan2(m[..., 2, 1], m[..., 2, 2])
    return np.stack([yaw, pitch, roll], axis=-1)


def _matrix_from_6d(rows: Array) -> Array:
    first = rows[..., :3] / np.linalg.norm(rows[..., :3], axis=-1, keepdims=True)
    second = rows[..., 3:] - np.sum(first * rows[..., 3:], axis=-1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-2)


def _6d_from_matrix(matrix: Array) -> Array:
    return matrix[..., :2, :].reshape(*matrix.shape[:-2], 6)


_READERS: dict[str, Callable[[Array], Array]] = {
    AXIS_ANGLE: _matrix_from_axis_angle,
    "quaternion_wxyz": _matrix_from_wxyz,
    "quaternion_xyzw": lambda xyzw: _matrix_from_wxyz(np.roll(xyzw, 1, axis=-1)),
    "euler_rpy": _matrix_from_rpy,
    "euler_ypr": _matrix_from_ypr,
    "rotation_6d": _matrix_from_6d,
}
_WRITERS: dict[str, Callable[[Array], Array]] = {
    AXIS_ANGLE: _axis_angle_from_matrix,
    "quaternion_wxyz": _wxyz_from_matrix,
    "quaternion_xyzw": lambda matrix: np.roll(_wxyz_from_matrix(matrix), -1, axis=-1),
    "euler_rpy": _rpy_from_matrix,
    "euler_ypr": _ypr_from_matrix,
    "rotation_6d": _6d_from_matrix,
}
ROTATION_SIZES = {
    AXIS_ANGLE: 3,
    "quaternion_wxyz": 4,
    "quaternion_xyzw": 4,
    "euler_rpy": 3,
    "euler_ypr": 3,
    "rotation_6d": 6,
}


def turn_further(start: Array, by: Array, form: str) -> Array:
    """The rotation (..., d) that comes of `start` and then the turn `by` about axes of the parent frame."""
    return _WRITERS[form](_READERS[form](by) @ _READERS[form](start))


def turn_between(start: Array, end: Array, form: str) -> Array:
    """The turn `by` with turn_further(start, by) = end, (..., d)."""
    return _WRITERS[form](_READERS[form](end) @ np.swapaxes(_READERS[form](start), -1, -2))
