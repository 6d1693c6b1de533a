"""Messages as bytes: CDR that is a NumPy record behind four bytes, and frames as compressed images. Pure.

The fields of a message lie eight-byte first and their sizes are fixed in a run, so CDR needs no padding between them:
encoding copies a packed record, decoding is `np.frombuffer`, and every bit survives. Text stands behind the rest.
A layout is read back from the schema that is in the file: a log tells by itself what is in it.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.flight.messages import CDR, TEXT, Field, Message, packed, shape_of

ENCAPSULATION = b"\x00\x01\x00\x00"  # CDR, little endian
FORMS = PNG, JPEG = "png", "jpeg"
PNG_OPTIONS = {"compress_level": 1, "compress_type": zlib.Z_RLE}  # docs/decisions/0024-flight-log.md
JPEG_QUALITY = 90

IMAGE_SCHEMA_NAME = "sensor_msgs/msg/CompressedImage"
IMAGE_SCHEMA = f"""std_msgs/Header header
string format
uint8[] data
{"=" * 80}
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
{"=" * 80}
MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
"""
_SCHEMA_LINE = re.compile(r"^(\w+)(?:\[(\d+)\])? (\w+) *(?:# (?:\(((?:\w=\d+(?:, )?)+)\))?.*)?$")


class BadMessage(OnbeatError):
    """Bytes that are no message of their schema, or a schema that this version cannot read."""


class Encoded(NamedTuple):
    """A message on its way to the file, and to whoever watches. t_ns: monotonic, when it is from."""

    topic: str
    message: bytes
    t_ns: int
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the fields of a CDR message lie. fixed: those of fixed size, packed. texts: names of those behind."""

    fixed: np.dtype[np.void]
    texts: tuple[str, ...] = ()

    @property
    def dtype(self) -> np.dtype[np.void]:
        """Of decoded records: texts are str objects."""
        if not self.texts:
            return self.fixed
        fixed = [(name, self.fixed[name]) for name in self.fixed.names or ()]
        return np.dtype([*fixed, *((name, object) for name in self.texts)])


def layout_of(message: Message, sizes: Mapping[str, int]) -> Layout:
    """Of a CDR message in a run."""
    assert message.encoding == CDR, message.topic
    return Layout(packed(message.fields, sizes), tuple(f.name for f in message.fields if f.kind == TEXT))


def schema_text(message: Message, sizes: Mapping[str, int]) -> str:
    """The ros2msg schema of a CDR message, with shape, unit and meaning in its comments."""
    lines = [_schema_line(field, sizes) for field in message.fields if prod(shape_of(field, sizes))]
    return "\n".join([f"# {message.meaning}", *lines, ""])


def _schema_line(field: Field, sizes: Mapping[str, int]) -> str:
    kind = "string" if field.kind == TEXT else field.kind
    letters = field.shape.split()
    size = f"[{prod(sizes[letter] for letter in letters)}]" if letters else ""
    shape = f"({', '.join(f'{letter}={sizes[letter]}' for letter in letters)}) " if letters else ""
    return f"{kind}{size} {field.name}  # {shape}{field.unit + ': ' if field.unit else ''}{field.meaning}"


def parse_schema(text: str) -> Layout:
    """The layout that `schema_text` describes. Raises BadMessage for any other schema."""
    fixed, texts = [], list[str]()
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        found = _SCHEMA_LINE.match(line)
        if found is None:
            raise BadMessage(f"a schema with the line '{line}': open it with the version that wrote it")
        kind, count, name, shape = found.groups()
        if kind == "string":
            texts.append(name)
        else:
            fixed.append((name, _kind(kind), _shape(shape, count)))
    return Layout(np.dtype(fixed), tuple(texts))


def _shape(shape: str | None, count: str | None) -> tuple[int, ...]:
    """From "J=6, C=16" where there is that, else from the count."""
    if shape is not None:
        return tuple(int(item.split("=")[1]) for item in shape.split(", "))
    return () if count is None else (int(count),)


def _kind(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name).newbyteorder("<")
    except TypeError:
        raise BadMessage(f"a schema with a field of type '{name}': open it with the version that wrote it") from None


def encode(layout: Layout, values: Mapping[str, Any]) -> bytes:
    """One message. values: a scalar, array or text per field; rows that an array does not have are NaN, or 0."""
    record = np.zeros(1, layout.fixed)
    for name in layout.fixed.names or ():
        _fill(record[name][0:1], values[name])
    return ENCAPSULATION + record.tobytes() + _encode_texts([values[name] for name in layout.texts], layout)


def _fill(cell: NDArray[Any], value: Any) -> None:
    array = np.asarray(value)
    if array.shape != cell.shape[1:] and cell.dtype.kind == "f":
        cell[:] = np.nan
    if array.size:
        cell[(0, *(slice(n) for n in array.shape))] = array


def _encode_texts(texts: Sequence[str], layout: Layout) -> bytes:
    out, at = b"", layout.fixed.itemsize
    for text in texts:
        part = _aligned(at + len(out)) + _string(text)
        out += part
    return out


def _aligned(at: int) -> bytes:
    return b"\x00" * (-at % 4)


def _string(text: str) -> bytes:
    raw = text.encode() + b"\x00"
    return struct.pack("<I", len(raw)) + raw


def encode_rows(records: NDArray[np.void]) -> Iterator[bytes]:
    """A message per row of a packed array (N,) without text."""
    size, raw = records.dtype.itemsize, records.tobytes()
    return (ENCAPSULATION + raw[k : k + size] for k in range(0, len(raw), size))


def decode(layout: Layout, messages: Sequence[bytes]) -> NDArray[np.void]:
    """Messages as records (N,) of layout.dtype. Raises BadMessage when one is too short."""
    end = len(ENCAPSULATION) + layout.fixed.itemsize
    if any(len(message) < end for message in messages):
        raise BadMessage(f"a message of fewer than {end} bytes: its file is damaged")
    fixed = np.frombuffer(b"".join(message[len(ENCAPSULATION) : end] for message in messages), layout.fixed)
    if not layout.texts:
        return fixed
    records = np.empty(len(messages), layout.dtype)
    for name in layout.fixed.names or ():
        records[name] = fixed[name]
    for k, message in enumerate(messages):
        for name, text in zip(layout.texts, _strings(message, end, len(layout.texts)), strict=True):
            records[name][k] = text
    return records


def _strings(message: bytes, at: int, count: int) -> list[str]:
    """Strings of CDR that stand from `at`, the encapsulation included in it."""
    texts = list[str]()
    for _ in range(count):
        text, at = _string_at(message, at)
        texts.append(text)
    return texts


def _string_at(message: bytes, at: int) -> tuple[str, int]:
    """The string at an offset, and where it ends."""
    at += -at % 4  # the encapsulation is four bytes long: it shifts no alignment
    try:
        (length,) = struct.unpack_from("<I", message, at)
        return message[at + 4 : at + 3 + length].decode(), at + 4 + length
    except (struct.error, UnicodeDecodeError):
        raise BadMessage("a message whose text does not fit: its file is damaged") from None


def encode_frame(rgb: NDArray[np.uint8], t_capture_ns: int, camera: str, form: str = PNG) -> bytes:
    """A frame (height, width, 3) as a CompressedImage. form: PNG or JPEG."""
    seconds, nanoseconds = divmod(t_capture_ns, 1_000_000_000)
    out = struct.pack("<iI", seconds, nanoseconds) + _string(camera)
    out += _aligned(len(out)) + _string(form)
    data = compress(rgb, form)
    return ENCAPSULATION + out + _aligned(len(out)) + struct.pack("<I", len(data)) + data


def decode_frame(message: bytes) -> tuple[int, NDArray[np.uint8]]:
    """(t_capture_ns, rgb) of `encode_frame`. Raises BadMessage."""
    t_capture_ns, _, data = split_frame(message)
    try:
        return t_capture_ns, np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise BadMessage(f"a frame that is no picture ({error}): its file is damaged") from None


def split_frame(message: bytes) -> tuple[int, str, bytes]:
    """(t_capture_ns, PNG or JPEG, the picture's file) of a CompressedImage."""
    try:
        seconds, nanoseconds = struct.unpack_from("<iI", message, len(ENCAPSULATION))
        _, at = _string_at(message, len(ENCAPSULATION) + 8)
        form, at = _string_at(message, at)
        at += -at % 4
        (length,) = struct.unpack_from("<I", message, at)
    except struct.error:
        raise BadMessage("a frame that is cut short: its file is damaged") from None
    return seconds * 1_000_000_000 + nanoseconds, form, message[at + 4 : at + 4 + length]


def compress(rgb: NDArray[np.uint8], form: str) -> bytes:
    """A picture's file: PNG keeps every bit, JPEG does not."""
    out = io.BytesIO()
    options = PNG_OPTIONS if form == PNG else {"quality": JPEG_QUALITY}
    Image.fromarray(rgb).save(out, format=form, **options)
    return out.getvalue()
