"""The log's files: MCAP, each beginning with the header, given to the disk twice a second, the oldest given up.

No thread and no clock: `recorder.py` calls this from its own.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from mcap.writer import CompressionType, Writer

from onbeat.runtime.flight.encoding import IMAGE_SCHEMA, IMAGE_SCHEMA_NAME, encode, layout_of, schema_text
from onbeat.runtime.flight.messages import BY_TOPIC, CAMERA, CDR, IMAGE, MESSAGES, Message, json_schema

SUFFIX: Final = ".mcap"
DEFAULT_BUDGET_BYTES: Final = 2_000_000_000
FILES_OF_BUDGET: Final = 8  # what is given up at a time is an eighth of it
MOST_CHUNK_BYTES: Final = 64_000_000  # of an MCAP chunk: `sync` ends it long before


class LogWriter:
    """Writes one log. Everything may raise OSError when the disk is full or gone; what was synced stays readable.

    header: the fields of /header, with `sizes` and `cameras`. A context manager: leaving it closes the file.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], *, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._header, self._budget_bytes = folder, header, budget_bytes
        self._sizes: Mapping[str, int] = header["sizes"]
        self._layouts = {m.topic: layout_of(m, self._sizes) for m in MESSAGES if m.encoding == CDR}
        self._next_file, self._latest_ns = 0, int(header["started_ns"])
        self._closed_bytes: dict[Path, int] = {}
        self._open_file()

    def __enter__(self) -> "LogWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def encode(self, topic: str, values: Mapping[str, Any]) -> bytes:
        """A message of a CDR topic, or of a JSON one. values: of its fields, by name."""
        if BY_TOPIC[topic].encoding == CDR:
            return encode(self._layouts[topic], values)
        return json.dumps(values).encode()

    def write(self, topic: str, message: bytes, t_ns: int, *, sequence: int = 0) -> None:
        """Add an encoded message. t_ns: monotonic, when it is from. sequence: of the sender's own count."""
        self._latest_ns = max(self._latest_ns, t_ns)
        self._writer.add_message(self._channels[topic], t_ns, message, t_ns, sequence & 0xFFFFFFFF)

    def write_values(self, topic: str, values: Mapping[str, Any], t_ns: int) -> None:
        """Encode and add a message."""
        self.write(topic, self.encode(topic, values), t_ns)

    def sync(self) -> None:
        """End the chunk and have the disk keep it; begin another file, and give up the oldest, when it is time to."""
        self._writer.flush()
        os.fsync(self._stream.fileno())
        self._synced_bytes = self._stream.tell()
        if self._stream.tell() * FILES_OF_BUDGET >= self._budget_bytes:
            self._close_file()
            self._give_up_oldest()
            self._open_file()

    def close(self) -> None:
        """End the file; closing twice is harmless."""
        if not self._stream.closed:
            self._close_file()

    def abandon(self) -> None:
        """Leave the log as it was when it was synced last, after an OSError."""
        with suppress(OSError):
            self._stream.close()
        with suppress(OSError):
            os.truncate(self._stream.name, self._synced_bytes)

    def _open_file(self) -> None:
        self._stream = (self._folder / f"{self._next_file:06d}{SUFFIX}").open("wb")
        self._synced_bytes = 0
        self._next_file += 1
        self._writer = Writer(self._stream, chunk_size=MOST_CHUNK_BYTES, compression=CompressionType.NONE)
        self._writer.start(profile="ros2", library="onbeat")
        self._channels = dict(self._register(message) for message in _topics(self._header["cameras"]))
        self.write_values("/header", self._header, self._latest_ns)
        self._writer.flush()
        self._synced_bytes = self._stream.tell()
        _sync_folder(self._folder)

    def _register(self, message: Message) -> tuple[str, int]:
        if message.encoding == CDR:
            name, kind, text = message.schema_name, "ros2msg", schema_text(message, self._sizes)
        elif message.encoding == IMAGE:
            name, kind, text = IMAGE_SCHEMA_NAME, "ros2msg", IMAGE_SCHEMA
        else:
            name, kind, text = message.schema_name, "jsonschema", json.dumps(json_schema(message))
        schema = self._writer.register_schema(name, kind, text.encode())
        encoding = "json" if kind == "jsonschema" else "cdr"
        return message.topic, self._writer.register_channel(message.topic, encoding, schema)

    def _close_file(self) -> None:
        self._writer.finish()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._synced_bytes = self._closed_bytes[Path(self._stream.name)] = self._stream.tell()
        self._stream.close()

    def _give_up_oldest(self) -> None:
        """Until what is there and a file more fit the budget."""
        most = self._budget_bytes * (FILES_OF_BUDGET - 1) // FILES_OF_BUDGET
        while sum(self._closed_bytes.values()) > most:
            oldest = next(iter(self._closed_bytes))
            oldest.unlink(missing_ok=True)
            del self._closed_bytes[oldest]


def _topics(cameras: Iterable[str]) -> Iterable[Message]:
    """The messages of a run, a topic per camera."""
    for message in MESSAGES:
        if message.topic == CAMERA:
            yield from (message._replace(topic=CAMERA + name) for name in cameras)
        else:
            yield message


def _sync_folder(folder: Path) -> None:
    """Have the disk keep that there is another file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
