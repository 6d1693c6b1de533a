"""A flight log, whole or damaged: whatever can still be read is read, and what can not is named.

log = read_log(folder)
log.header["config"], log.records("/tick")["goal_rad"], log.frames("top"), log.events, log.outcome, log.problems
"""

import io
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import Channel, Chunk, Message, Schema
from mcap.stream_reader import breakup_chunk
from numpy.typing import NDArray

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.flight.encoding import BadMessage, Layout, decode, decode_frame, parse_schema, split_frame
from onbeat.runtime.flight.fault_bits import in_this_version
from onbeat.runtime.flight.messages import CAMERA, FORMAT
from onbeat.runtime.flight.writer import SUFFIX

LOG_FOLDER: Final = "log"
MAGIC: Final = b"\x89MCAP0\r\n"
_RECORD_HEAD: Final = struct.Struct("<BQ")


class LogError(OnbeatError):
    """A log that cannot be used for what is asked."""


class NoLog(LogError):
    """There is nothing that could be read."""


@dataclass(frozen=True, slots=True)
class Log:
    """What was read. files: oldest first. problems: what is not there, and why; empty for a whole log.

    header: the fields of /header. events: those of /event. outcome: of /outcome, None when the run was cut short.
    """

    files: tuple[Path, ...]
    header: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...]
    outcome: Mapping[str, Any] | None
    problems: tuple[str, ...]
    _records: Mapping[str, NDArray[np.void]]

    @property
    def topics(self) -> tuple[str, ...]:
        """CDR topics of the log."""
        return tuple(self._records)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of V."""
        return tuple(self.header.get("cameras", ()))

    def records(self, topic: str, *needs: str) -> NDArray[np.void]:
        """Of a CDR topic, (N,) structured with the fields that the *file* has, in the order they were logged.

        Raises LogError when the log has no such topic, or lacks one of the fields `needs`: another version wrote it.
        """
        records = self._records.get(topic)
        if records is None:
            raise LogError(f"the log in {self.files[0].parent} has no {topic}: it can be read, but not used for this")
        missing = [name for name in needs if name not in (records.dtype.names or ())]
        if missing:
            version = self.header.get("versions", {}).get("onbeat", "another version")
            raise LogError(f"the log has no {topic}.{missing[0]} (written by onbeat {version}): use that version")
        return records

    def frames(self, camera: str) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(t_capture_ns, rgb (height, width, 3)) of every frame, read from the files as they are asked for."""
        return (decode_frame(message) for message in self._frame_messages(camera))

    def pictures(self, camera: str) -> Iterator[tuple[int, str, bytes]]:
        """(t_capture_ns, "png" or "jpeg", the picture's file) of every frame."""
        return (split_frame(message) for message in self._frame_messages(camera))

    def last_picture(self, camera: str) -> bytes | None:
        """The picture's file of the newest frame."""
        for path in reversed(self.files):
            messages = [message.data for topic, message in read_messages(path, []) if topic == CAMERA + camera]
            if messages:
                return split_frame(messages[-1])[2]
        return None

    def _frame_messages(self, camera: str) -> Iterator[bytes]:
        for path in self.files:
            for topic, message in read_messages(path, []):
                if topic == CAMERA + camera:
                    yield message.data


@dataclass(slots=True)
class _Found:
    """What the files hold, while they are read."""

    layouts: dict[str, Layout] = field(default_factory=dict)
    messages: dict[str, list[bytes]] = field(default_factory=dict)
    header: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None
    events: list[dict[str, Any]] = field(default_factory=list)


def read_log(path: Path) -> Log:
    """A log folder, the folder of a run, or one file of a log. Raises NoLog when there is none that begins."""
    files, problems = log_files(path), list[str]()
    found = _Found()
    problems += _missing_files(files)
    for file in files:
        _read_file(file, found, problems)
    if found.header is None:
        raise NoLog("; ".join([f"no log can be read from {path}", *problems]))
    problems += version_problems(found.header)
    if found.outcome is None:
        problems.append("the run was cut short: the log has no outcome")
    records = {topic: _decode(topic, found, problems) for topic in found.layouts}
    if "/tick" in records:
        records["/tick"] = in_this_version(records["/tick"], found.header)
    return Log(tuple(files), found.header, tuple(found.events), found.outcome, tuple(problems), records)


def version_problems(header: Mapping[str, Any]) -> list[str]:
    """That a log is of another version, where it is."""
    found = header.get("format")
    return [] if found == FORMAT else [f"format {found}, this version reads {FORMAT}: fields may be missing"]


def log_files(path: Path) -> list[Path]:
    """The files of a log folder, of a run's, or the one that is named, oldest first. Raises NoLog."""
    if path.is_file():
        return [path]
    folder = path / LOG_FOLDER if (path / LOG_FOLDER).is_dir() else path
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise NoLog(f"{path} holds no flight log: give the folder that `onbeat run` printed")
    return files


def _missing_files(files: Sequence[Path]) -> Iterator[str]:
    """The numbers that a rotation or somebody took away."""
    numbers = [int(number) for file in files if (number := re.sub(r"\D", "", file.stem))]
    if len(files) > 1 and numbers and numbers[0] > 0:
        yield f"the first {numbers[0]} files were given up for the disk budget"
    gaps = set(range(numbers[0], numbers[-1])) - set(numbers) if numbers else set[int]()
    yield from (f"file {number:06d}{SUFFIX} is missing" for number in sorted(gaps))


def _read_file(path: Path, found: _Found, problems: list[str]) -> None:
    for topic, message in read_messages(path, problems, found.layouts):
        if topic in found.layouts:
            found.messages.setdefault(topic, []).append(message.data)
        elif topic in ("/header", "/event", "/outcome"):
            _take_json(topic, message.data, found, problems)


def _take_json(topic: str, data: bytes, found: _Found, problems: list[str]) -> None:
    try:
        values = json.loads(data)
    except ValueError:
        problems.append(f"a message of {topic} is no JSON")
        return
    if topic == "/header":
        found.header = found.header or values
    elif topic == "/event":
        found.events.append(values)
    else:
        found.outcome = values


def _decode(topic: str, found: _Found, problems: list[str]) -> NDArray[np.void]:
    layout, messages = found.layouts[topic], found.messages.get(topic, [])
    try:
        return decode(layout, messages)
    except BadMessage as error:
        problems.append(f"{topic}: {error}")
        return np.empty(0, layout.dtype)


def read_messages(
    path: Path, problems: list[str], layouts: dict[str, Layout] | None = None
) -> Iterator[tuple[str, Message]]:
    """(topic, message) of one file in its order; to `problems` is added what is wrong with it.

    layouts: filled with those of the CDR topics that stand in the file.
    """
    schemas, topics = dict[int, Schema](), dict[int, str]()
    for chunk in _chunks(path, problems):
        for record in _open_chunk(path, chunk, problems):
            if isinstance(record, Schema):
                schemas[record.id] = record
            elif isinstance(record, Channel):
                topics[record.id] = record.topic
                _keep_layout(record, schemas.get(record.schema_id), {} if layouts is None else layouts, problems)
            elif isinstance(record, Message) and record.channel_id in topics:
                yield topics[record.channel_id], record


def _keep_layout(channel: Channel, schema: Schema | None, layouts: dict[str, Layout], problems: list[str]) -> None:
    if schema is None or schema.encoding != "ros2msg" or channel.topic.startswith(CAMERA):
        return
    try:
        layouts.setdefault(channel.topic, parse_schema(schema.data.decode()))
    except (BadMessage, UnicodeDecodeError) as error:
        problems.append(f"{channel.topic} cannot be read: {error}")


def _open_chunk(path: Path, chunk: Chunk, problems: list[str]) -> Sequence[Any]:
    try:
        return breakup_chunk(chunk, validate_crc=True)
    except (McapError, ValueError, struct.error, EOFError) as error:
        problems.append(f"{path.name}: a chunk is damaged ({error}): its messages are lost")
        return ()


def _chunks(path: Path, problems: list[str]) -> Iterator[Chunk]:
    """The whole chunks of a file, until it ends or is cut."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            problems.append(f"{path.name} is no MCAP file, or was cut within its first bytes")
            return
        while True:
            head = stream.read(_RECORD_HEAD.size)
            if len(head) < _RECORD_HEAD.size:
                problems.append(_cut_text(path, size))
                return
            opcode, length = _RECORD_HEAD.unpack(head)
            if stream.tell() + length > size:
                problems.append(_cut_text(path, size))
                return
            body = stream.read(length)
            if opcode == Opcode.CHUNK:
                yield from _chunk(path, body, problems)
            elif opcode == Opcode.FOOTER:
                if stream.read() != MAGIC:
                    problems.append(_cut_text(path, size))
                return


def _cut_text(path: Path, size: int) -> str:
    return f"{path.name} is cut off after {size} bytes: what was written after the last whole chunk is lost"


def _chunk(path: Path, body: bytes, problems: list[str]) -> Iterator[Chunk]:
    try:
        yield Chunk.read(ReadDataStream(io.BytesIO(body)))
    except (McapError, ValueError, struct.error) as error:
        problems.append(f"{path.name}: a chunk is damaged ({error}): its messages are lost")
