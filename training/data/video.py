"""Camera frames as MP4: written frame by frame, read at a time, by PyAV (FFmpeg)."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import av.error
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from onbeat.training.data.layout import DataError

TOLERANCE_S = 1e-4  # between the time asked and the frame's: LeRobot's own
OPEN_FILES = 16  # per thread


@dataclass(frozen=True, slots=True)
class Encoding:
    """How frames become a video stream. Key frames stand close, so that any frame is near one."""

    codec: str
    pixels: str
    options: tuple[tuple[str, str], ...]

    @property
    def halves_colour(self) -> bool:
        """Whether two by two pixels share a colour, so that sides must be even."""
        return self.pixels == "yuv420p"


ENCODINGS = {
    # H.264 in RGB with quantiser 0: every bit survives, and FFmpeg's own decoder reads it.
    "lossless": Encoding("libx264rgb", "rgb24", (("qp", "0"), ("preset", "veryfast"), ("g", "2"), ("bf", "0"))),
    "h264": Encoding("libx264", "yuv420p", (("crf", "20"), ("preset", "veryfast"), ("g", "2"), ("bf", "0"))),
}


class VideoWriter:
    """One MP4 file; frame k has time k / fps. Close it, or it is no file."""

    def __init__(self, path: Path, *, fps: float, height: int, width: int, encoding: str) -> None:
        chosen = ENCODINGS[encoding]
        self.path, self.count = path, 0
        self._rate = Fraction(fps).limit_denominator(1001)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w")
        stream = self._container.add_stream(chosen.codec, rate=self._rate, options=dict(chosen.options))
        assert isinstance(stream, av.VideoStream), stream
        self._stream = stream
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, chosen.pixels
        self._stream.codec_context.thread_count = 1

    def append(self, rgb: NDArray[np.uint8]) -> None:
        """One more frame (H, W, 3)."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        frame.pts, frame.time_base = self.count, 1 / self._rate
        self._container.mux(self._stream.encode(frame))
        self.count += 1

    def close(self) -> None:
        """Write what is still held back, and the index without which nothing can be read."""
        self._container.mux(self._stream.encode())
        self._container.close()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class VideoReader:
    """One open MP4 file. Frames in rising order cost one decoding each; any other costs those since its key frame.

    For one thread at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except FileNotFoundError:
            raise DataError(f"{path} is missing: copy the dataset's videos too") from None
        except (av.error.FFmpegError, OSError, IndexError) as error:
            raise DataError(f"{path} cannot be read as a video ({error}): copy it again, whole") from None
        self._stream.codec_context.thread_count = 1  # parallel over samples instead
        self._converter = VideoReformatter()
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._decoded_s: float | None = None

    @property
    def frames(self) -> int:
        """How many frames the file says it holds; 0 where it does not say."""
        return self._stream.frames

    @property
    def duration_s(self) -> float:
        """How long it is, as it says itself."""
        assert self._stream.time_base is not None
        return float((self._stream.duration or 0) * self._stream.time_base)

    def read(self, time_s: float, tolerance_s: float = TOLERANCE_S) -> NDArray[np.uint8]:
        """The frame at `time_s`: (H, W, 3) RGB. Raises DataError where there is none within the tolerance."""
        try:
            return self._read(time_s, tolerance_s)
        except av.error.FFmpegError as error:
            self._decoded_s = None
            raise DataError(f"{self.path} at {time_s:.4f} s cannot be decoded ({error}): copy it again") from None

    def close(self) -> None:
        self._container.close()

    def _read(self, time_s: float, tolerance_s: float) -> NDArray[np.uint8]:
        if not self._follows(time_s):
            self._seek(time_s)
        for frame in self._frames:
            self._decoded_s = frame.time
            if frame.time >= time_s - tolerance_s:
                if frame.time > time_s + tolerance_s:
                    break
                return self._pixels(frame)
        last = "no frame at all" if self._decoded_s is None else f"one at {self._decoded_s:.4f} s"
        self._decoded_s = None
        raise DataError(
            f"{self.path} has no frame within {tolerance_s} s of {time_s:.4f} s, the nearest found is {last}: "
            "the file is truncated, or its rate is not the dataset's"
        )

    def _pixels(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        # The planes of a lossless frame are its colours: no conversion, a tenth of the time.
        plain = frame if frame.format.name == "gbrp" else self._converter.reformat(frame, format="rgb24")
        return np.asarray(plain.to_ndarray(), np.uint8)

    def _follows(self, time_s: float) -> bool:
        """Whether the frame is the next one, or close behind what was decoded last."""
        rate = self._stream.average_rate
        return self._decoded_s is not None and rate is not None and 0 < (time_s - self._decoded_s) * rate < 2.5

    def _seek(self, time_s: float) -> None:
        assert self._stream.time_base is not None
        self._container.seek(max(0, round(time_s / self._stream.time_base)), stream=self._stream)
        self._frames = self._container.decode(self._stream)
        self._decoded_s = None


class VideoReaders:
    """A few open files per thread; the one used longest ago is closed first."""

    def __init__(self, limit: int = OPEN_FILES) -> None:
        self._limit, self._local = limit, threading.local()

    def reader(self, path: Path) -> VideoReader:
        """The open file, for the calling thread alone. Raises DataError."""
        opened: OrderedDict[Path, VideoReader] = self._local.__dict__.setdefault("opened", OrderedDict())
        if path not in opened:
            opened[path] = VideoReader(path)
            if len(opened) > self._limit:
                opened.popitem(last=False)[1].close()
        opened.move_to_end(path)
        return opened[path]
