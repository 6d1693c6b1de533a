from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from onbeat.embodiment.rotation import ROTATION_SIZES, convert_rotation

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "unit_transforms.npz")
PAIRS = [name.removeprefix("rot/").split("__to__") for name in GOLDEN.files if "__to__" in name]
PUBLISHED = {"quaternion": "quaternion_wxyz", "euler_angles_rpy": "euler_rpy", "euler_angles_ypr": "euler_ypr"}
FORMS = list(ROTATION_SIZES)


def scipy_write(rotation: Rotation, form: str) -> np.ndarray:
    """The same forms from an implementation that is not ours."""
    return {
        "axis_angle": rotation.as_rotvec,
        "quaternion_xyzw": lambda: rotation.as_quat(canonical=True),
        "quaternion_wxyz": lambda: np.roll(rotation.as_quat(canonical=True), 1, axis=-1),
        "euler_rpy": lambda: rotation.as_euler("XYZ"),
        "euler_ypr": lambda: rotation.as_euler("ZYX"),
        "rotation_6d": lambda: rotation.as_matrix()[..., :2, :].reshape(-1, 6),
    }[form]()


def test_the_same_form_is_left_untouched_even_beyond_half_a_turn():
    long_way = np.array([[-2.8, -2.1, 2.6]])
    assert convert_rotation(long_way, "axis_angle", "axis_angle") is long_way


@pytest.mark.parametrize("form", FORMS)
def test_no_rotation_stays_none(form):
    zero = convert_rotation(np.zeros((1, 3)), "axis_angle", form)
    assert np.array_equal(np.abs(convert_rotation(zero, form, "axis_angle")), np.zeros((1, 3)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_half_a_turn_keeps_its_angle(axis):
    half = np.zeros((1, 3))
    half[0, axis] = np.pi
    back = convert_rotation(convert_rotation(half, "axis_angle", "quaternion_wxyz"), "quaternion_wxyz", "axis_angle")
    np.testing.assert_allclose(np.abs(back), half, atol=1e-15)


def test_tiny_angles_keep_their_digits():
    tiny = np.array([[1e-9, -2e-9, 3e-9]])
    back = convert_rotation(convert_rotation(tiny, "axis_angle", "quaternion_xyzw"), "quaternion_xyzw", "axis_angle")
    np.testing.assert_allclose(back, tiny, rtol=1e-12)


def test_a_quaternion_and_its_negative_are_one_rotation_and_length_does_not_matter():
    q = np.array([[0.3, -0.4, 0.5, 0.6]])
    expected = convert_rotation(q, "quaternion_wxyz", "euler_ypr")
    np.testing.assert_allclose(convert_rotation(-7 * q, "quaternion_wxyz", "euler_ypr"), expected, atol=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_float32_stays_float32(form):
    single = convert_rotation(np.float32([[0.1, -0.2, 0.3]]), "axis_angle", form)
    assert single.dtype == np.float32
    assert convert_rotation(single, form, "axis_angle").dtype == np.float32


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_as_published(source, target):
    got = convert_rotation(GOLDEN[f"rot/{source}"], PUBLISHED.get(source, source), PUBLISHED.get(target, target))
    # A few ulps of an angle of pi: the order of the additions is not published.
    np.testing.assert_allclose(got, GOLDEN[f"rot/{source}__to__{target}"], rtol=0, atol=1e-15)


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_against_scipy(source, target):
    rotation = Rotation.random(200, random_state=7)
    if source == target:
        return
    got = convert_rotation(scipy_write(rotation, source), source, target)
    np.testing.assert_allclose(got, scipy_write(rotation, target), rtol=0, atol=1e-12)


def test_leading_axes_are_kept():
    stacked = Rotation.random(6, random_state=1).as_rotvec().reshape(2, 3, 3)
    got = convert_rotation(stacked, "axis_angle", "rotation_6d")
    assert got.shape == (2, 3, 6)
    np.testing.assert_array_equal(got[1, 2], convert_rotation(stacked[1, 2], "axis_angle", "rotation_6d"))
