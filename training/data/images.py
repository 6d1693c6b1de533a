"""One camera frame as bytes that lose nothing: PNG, of 8-bit colour or of 16-bit depth."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from onbeat.training.data.layout import DataError

COMPRESS_LEVEL = 1  # of zlib: the size hardly falls beyond, the time grows


def encode_png(pixels: NDArray[Any]) -> bytes:
    """(H, W, 3) uint8 RGB, or (H, W) uint16 depth, as a PNG file."""
    assert pixels.dtype == (np.uint8 if pixels.ndim == 3 else np.uint16), (pixels.dtype, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=COMPRESS_LEVEL)
    return file.getvalue()


def decode_image(data: bytes, where: str) -> NDArray[Any]:
    """The inverse; also JPEG and other colour modes, which become RGB. Raises DataError that begins with `where`."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I"):
                return np.asarray(image).astype(np.uint16)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where} is no readable image ({error}): copy the file again") from None


def read_stored(value: dict[str, Any] | None, folder: Path, where: str) -> NDArray[Any]:
    """An image cell of a table: its bytes, or the path (from the dataset's folder) of a file that has them."""
    data = (value or {}).get("bytes")
    path = (value or {}).get("path")
    if data is None and path:
        try:
            data = (folder / path).read_bytes()
        except OSError as error:
            raise DataError(f"{where}: {folder / path} cannot be read ({error.strerror}): copy it again") from None
    if data is None:
        raise DataError(f"{where} holds no image: record that episode again or leave it out")
    return decode_image(data, where)
