from pathlib import Path

import numpy as np
import pytest

from onbeat.kernels.image import BadImage, crop_start, normalise_pixels, resize_and_crop, scaled_shape

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "unit_images.npz")
IMAGES = [name.removesuffix("/in") for name in GOLDEN.files if name.endswith("/in")]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        "image.png",
    ],
)
def test_anything_but_rgb_uint8_is_refused(image):
    with pytest.raises(BadImage, match="give RGB as uint8"):
        resize_and_crop(image, 56)


@pytest.mark.parametrize("name", IMAGES)
def test_bit_for_bit_as_recorded(name):
    size = int(GOLDEN["size"])
    got = normalise_pixels(resize_and_crop(GOLDEN[f"{name}/in"], size))
    np.testing.assert_array_equal(got, GOLDEN[f"{name}/out"])


def test_the_longer_side_is_truncated():
    assert scaled_shape(256, 342, 56) == (56, 74)  # 74.81
    assert scaled_shape(342, 256, 56) == (74, 56)
    assert scaled_shape(7, 7, 56) == (56, 56)


def test_a_crop_between_two_pixels_goes_to_the_even_one():
    assert [crop_start(56 + odd, 56) for odd in (0, 1, 2, 3, 5, 7)] == [0, 0, 1, 2, 2, 4]


def test_the_right_size_is_only_cropped_and_never_shared():
    image = np.random.default_rng(0).integers(0, 256, (8, 11, 3), np.uint8)
    got = resize_and_crop(image, 8)
    np.testing.assert_array_equal(got, image[:, 2:10])
    got[:] = 0
    assert image.any()


def test_one_pixel_and_views_that_are_not_contiguous():
    assert resize_and_crop(np.full((1, 1, 3), 9, np.uint8), 4).tolist() == np.full((4, 4, 3), 9).tolist()
    image = np.random.default_rng(1).integers(0, 256, (60, 80, 3), np.uint8)
    np.testing.assert_array_equal(resize_and_crop(image[::-1, ::-1], 56), resize_and_crop(image[::-1, ::-1].copy(), 56))


def test_normalised_stack_keeps_its_leading_axis():
    views = np.random.default_rng(2).integers(0, 256, (2, 4, 4, 3), np.uint8)
    got = normalise_pixels(views)
    assert got.shape == (2, 3, 4, 4)
    np.testing.assert_array_equal(got[1], normalise_pixels(views[1]))
    assert got[0, 0, 0, 0] == pytest.approx((views[0, 0, 0, 0] / 255 - 0.485) / 0.229, abs=1e-6)
