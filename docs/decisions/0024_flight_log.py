"""What a tick, a chunk and a frame cost to encode and to write, in the log's format and in others: 0024-flight-log.md.

    python docs/decisions/0024_flight_log.py

protobuf is measured where its package is, with a message of the same fields built at run time.
"""

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from onbeat.runtime.flight.encoding import PNG_OPTIONS, decode, encode, encode_rows, layout_of
from onbeat.runtime.flight.messages import BY_TOPIC, LETTERS, TICK_LOOP, TICK_RECORD, packed

SIZES = {**dict.fromkeys(LETTERS, 0), "J": 6, "V": 2, "C": 16, "A": 200, "I": 1, "T": 4}
TICK = layout_of(BY_TOPIC["/tick"], SIZES)
FORMS = {
    "PNG, level 0": {"format": "png", "compress_level": 0},
    "PNG, level 1": {"format": "png", "compress_level": 1},
    "PNG, level 1, runs only": {"format": "png", **PNG_OPTIONS},
    "PNG, level 6": {"format": "png", "compress_level": 6},
    "JPEG, 90": {"format": "jpeg", "quality": 90},
}
BATCH = 20  # ticks that a drain finds at 200 Hz


def ticks() -> np.ndarray:
    """A drain's worth, of ordinary values."""
    rows = np.zeros(BATCH, packed(TICK_RECORD + TICK_LOOP, SIZES))
    for name in rows.dtype.names:
        rows[name] = np.random.default_rng(1).normal(size=rows[name].shape) * 1e4
    return rows


def best_us(act: Callable[[], object], per: int = 1, repeats: int = 300) -> float:
    """Processor time, the median of many, of one of `per` things: a busy machine counts for little."""
    took = []
    for _ in range(repeats):
        begun = time.thread_time_ns()
        act()
        took.append(time.thread_time_ns() - begun)
    return float(np.median(took)) / 1e3 / per


def as_json(rows: np.ndarray) -> list[bytes]:
    return [json.dumps({n: row[n].tolist() for n in rows.dtype.names}).encode() for row in rows]


def protobuf_encoder(rows: np.ndarray) -> Callable[[], list[bytes]] | None:
    """Encoding `rows`, or None where protobuf is not installed."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        return None
    file = descriptor_pb2.FileDescriptorProto(name="tick.proto", syntax="proto3")
    message = file.message_type.add(name="Tick")
    kinds = {"i": 3, "f": 1, "u": 13}  # int64, double, uint32
    for number, name in enumerate(rows.dtype.names, 1):
        field = rows.dtype[name]
        label = 3 if field.shape else 1
        message.field.add(name=name, number=number, type=kinds[field.base.kind], label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    tick = message_factory.GetMessageClass(pool.FindMessageTypeByName("Tick"))
    return lambda: [tick(**{n: row[n].tolist() for n in rows.dtype.names}).SerializeToString() for row in rows]


def report_ticks() -> None:
    rows = ticks()
    protobuf = protobuf_encoder(rows)
    encoders = {"CDR": lambda: list(encode_rows(rows)), "JSON": lambda: as_json(rows)}
    if protobuf is not None:
        encoders["protobuf"] = protobuf
    print(f"{'tick':<10}{'encode, us':>12}{'bytes':>8}")
    for name, act in encoders.items():
        print(f"{name:<10}{best_us(act, BATCH):>12.2f}{len(act()[0]):>8}")
    messages = encoders["CDR"]()
    print(f"decode of CDR, all fields: {best_us(lambda: decode(TICK, messages), BATCH):.2f} us a tick")


def report_chunk() -> None:
    layout = layout_of(BY_TOPIC["/chunk"], SIZES)
    values = {name: np.zeros(layout.fixed[name].shape) for name in layout.fixed.names or ()}
    message = encode(layout, values)
    print(f"\nchunk     {best_us(lambda: encode(layout, values)):>12.1f}{len(message):>8}")


def report_frames(picture: np.ndarray) -> None:
    height, width, _ = picture.shape
    print(f"\n{f'frame {width} x {height}':<24}{'encode, ms':>14}{'bytes':>9}")
    for name, options in FORMS.items():
        data = packed_picture(picture, options)
        took_ms = best_us(lambda o=options: packed_picture(picture, o), repeats=20) / 1e3
        print(f"{name:<24}{took_ms:>14.2f}{len(data):>9}")


def packed_picture(picture: np.ndarray, options: dict) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, **options)
    return out.getvalue()


def scene(width: int, height: int) -> np.ndarray:
    """Smooth shades with a sensor's noise: what a camera gives, and harder to pack than what the twin draws."""
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    shade = 128 + 80 * np.sin(x)[..., None] * np.cos(y[..., None] + np.arange(3))
    return (shade + np.random.default_rng(0).normal(0, 2, shade.shape)).clip(0, 255).astype(np.uint8)


def main() -> int:
    report_ticks()
    report_chunk()
    for size in ((112, 112), (640, 480)):
        report_frames(scene(*size))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    sys.exit(main())
