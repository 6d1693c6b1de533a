"""From a camera's image to the network's: shorter side to S, centre crop, and ImageNet normalisation.

Pillow does the resize: its fixed-point bicubic on uint8 is what checkpoints were trained on, and any other bicubic
moves the pixels and with them the actions (docs/decisions/0002).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onbeat.embodiment.errors import OnbeatError

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


class BadImage(OnbeatError):
    """An image that is not (height, width, 3) uint8 RGB."""


def resize_and_crop(rgb: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Scale the shorter side to `size` and cut the middle.

    rgb: (height, width, 3) uint8. Returns (size, size, 3) uint8, an array of its own. Raises BadImage.
    """
    check_image(rgb)
    height, width = rgb.shape[:2]
    tall, wide = scaled_shape(height, width, size)
    if (tall, wide) != (height, width):
        rgb = np.asarray(Image.fromarray(rgb).resize((wide, tall), Image.Resampling.BICUBIC))
    top, left = crop_start(tall, size), crop_start(wide, size)
    return rgb[top : top + size, left : left + size].copy()


def scaled_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) after the resize; the longer side is truncated, not rounded."""
    short, long = min(height, width), max(height, width)
    longer = int(size * long / short)
    return (size, longer) if height <= width else (longer, size)


def crop_start(extent: int, size: int) -> int:
    """First row or column of the middle `size` of `extent`; halves round to the even number."""
    return round((extent - size) / 2)


def normalise_pixels(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(..., S, S, 3) uint8 to (..., 3, S, S) float32, ImageNet mean and deviation: what the vision tower sees."""
    scaled = (rgb.astype(np.float32) / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))


def check_image(rgb: Any) -> None:
    """Raise BadImage unless `rgb` is (height, width, 3) uint8 with at least one pixel."""
    if not isinstance(rgb, np.ndarray):
        raise BadImage(f"an image is a {type(rgb).__name__}: give RGB as uint8 (height, width, 3)")
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.size == 0:
        raise BadImage(f"an image is {rgb.dtype} {rgb.shape}: give RGB as uint8 (height, width, 3)")
