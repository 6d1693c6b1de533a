"""A log with its answers replaced by what a replay gives: how the reference of the regression test follows the code."""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.flight.encoding import encode_rows, layout_of
from onbeat.runtime.flight.messages import BY_TOPIC
from onbeat.runtime.flight.reader import read_messages
from onbeat.runtime.flight.recorder import SYNC_PERIOD_NS
from onbeat.runtime.flight.writer import SUFFIX, LogWriter
from onbeat.runtime.replay.recording import NotReplayable, Recording


def rewrite_log(
    recording: Recording, ticks: NDArray[np.void], chunks: NDArray[np.void], header: Mapping[str, Any]
) -> None:
    """Replace the recording's files; what was observed, and events, stay. ticks, chunks: as replayed, from the first on.

    The new files are whole before an old one goes. Raises NotReplayable for records of another version.
    """
    _check_layout(header["sizes"], {"/tick": ticks, "/chunk": chunks})
    files = recording.log.files
    with TemporaryDirectory(dir=files[0].parent) as fresh:
        with LogWriter(Path(fresh), header) as log:
            answers = {"/tick": encode_rows(ticks), "/chunk": encode_rows(chunks)}
            synced_ns = 0
            for topic, message in (item for path in files for item in read_messages(path, [])):
                if topic != "/header":
                    data = next(answers[topic], message.data) if topic in answers else message.data
                    log.write(topic, data, message.log_time, sequence=message.sequence)
                    synced_ns = _sync_in_time(log, synced_ns, message.log_time)
        for path in files:
            path.unlink()
        for path in Path(fresh).glob(f"*{SUFFIX}"):
            os.replace(path, files[0].parent / path.name)


def _sync_in_time(log: LogWriter, synced_ns: int, now_ns: int) -> int:
    """Sync as often as the recorder did, so that a damaged file loses no more; returns when it was done last."""
    if now_ns - synced_ns < SYNC_PERIOD_NS:
        return synced_ns
    log.sync()
    return now_ns


def _check_layout(sizes: Mapping[str, int], records: Mapping[str, NDArray[np.void]]) -> None:
    for topic, array in records.items():
        if len(array) and layout_of(BY_TOPIC[topic], sizes).fixed != array.dtype:
            raise NotReplayable(f"{topic} of the log has other fields than this version writes: record it again")
