"""A log with its answers replaced by what a replay gives: how the reference of the regression test follows the code."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from mcap.exceptions import McapError
from mcap.records import Channel, DataEnd, Header, McapRecord, Message, Schema
from mcap.stream_reader import StreamReader
from mcap.writer import CompressionType, Writer
from numpy.typing import NDArray

from onbeat.runtime.flight.encoding import encode_rows
from onbeat.runtime.flight.recorder import SYNC_PERIOD_NS
from onbeat.runtime.replay.recording import NotReplayable, Recording

Change = Callable[[str, bytes], bytes | None]  # topic and message -> the message to write, None for none
_FRESH: Final = ".fresh"


def rewrite_log(
    recording: Recording, ticks: NDArray[np.void], chunks: NDArray[np.void], header: Mapping[str, Any]
) -> None:
    """Replace the recording's files; what was observed stays, and so do events. ticks, chunks: as replayed.

    Raises NotReplayable for a damaged log, which stays as it is.
    """
    answers = {"/tick": encode_rows(ticks), "/chunk": encode_rows(chunks)}

    def answer(topic: str, data: bytes) -> bytes:
        if topic == "/header":
            return json.dumps(header).encode()
        return next(answers[topic], data) if topic in answers else data

    rewrite_files(recording.log.files, answer)


def rewrite_files(files: Sequence[Path], change: Change) -> None:
    """Every message of every file through `change`, in their order; schemas stay. An old file goes when all are new."""
    try:
        for path in files:
            with path.open("rb") as old, Path(f"{path}{_FRESH}").open("wb") as fresh:
                _rewrite_file(old, fresh, change)
    except McapError as problem:
        for path in files:
            Path(f"{path}{_FRESH}").unlink(missing_ok=True)
        raise NotReplayable(f"{files[0].parent} is damaged and stays as it is ({problem!r})") from None
    for path in files:
        os.replace(f"{path}{_FRESH}", path)


def _rewrite_file(old: BinaryIO, fresh: BinaryIO, change: Change) -> None:
    """In chunks as long as the recorder's, so that damage costs no more than it did."""
    writer = Writer(fresh, chunk_size=1 << 30, compression=CompressionType.NONE)
    schemas, channels, flushed_ns = dict[int, int](), dict[int, tuple[int, str]](), 0
    for record in _data_of(old):
        if isinstance(record, Header):
            writer.start(profile=record.profile, library=record.library)
        elif isinstance(record, Schema):
            schemas[record.id] = writer.register_schema(record.name, record.encoding, record.data)
        elif isinstance(record, Channel):
            channel = writer.register_channel(record.topic, record.message_encoding, schemas[record.schema_id])
            channels[record.id] = channel, record.topic
        elif isinstance(record, Message):
            channel, topic = channels[record.channel_id]
            data = change(topic, record.data)
            if data is not None:
                writer.add_message(channel, record.log_time, data, record.publish_time, record.sequence)
            if record.log_time - flushed_ns >= SYNC_PERIOD_NS:
                writer.flush()
                flushed_ns = record.log_time
    writer.finish()


def _data_of(stream: BinaryIO) -> Iterator[McapRecord]:
    """The records of a file up to its summary, which says some of them again."""
    return takewhile(lambda record: not isinstance(record, DataEnd), StreamReader(stream).records)
