"""The way from the recorder to a view: a process of its own behind a pipe that takes what fits and never makes wait.

    records thread ─▶ pipe, 1 MB ─▶ view process (`view.py`) ─▶ Rerun

A view that is slow is shown less; one that is gone, nothing.
"""

import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO, Final

from onbeat.runtime.flight.encoding import Encoded

PIPE_BYTES: Final = 1 << 20  # the most that Linux grants everybody
END_S: Final = 10.0  # for a view to save what it has
_HEAD: Final = struct.Struct("<IHq")  # bytes of message and of topic, t_ns


class ViewPipe:
    """Starts a view and shows it messages. A context manager: leaving it lets the view finish, and waits for that.

    dropped: messages that the view had no room for. command: of the process, for tests.
    """

    def __init__(self, target: str, header: Mapping[str, Any], *, command: tuple[str, ...] = ()) -> None:
        """target: as `view.open_stream` takes it."""
        program = command or (sys.executable, "-m", "onbeat.runtime.flight.view", "--follow", target)
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0, start_new_session=True
        )
        assert self._process.stdin is not None
        self._fd = self._process.stdin.fileno()
        with suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(self._fd, False)
        self._unsent = b""
        self.dropped = 0
        self.show(Encoded("/header", json.dumps(header).encode(), int(header["started_ns"])))

    def __enter__(self) -> "ViewPipe":
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def show(self, item: Encoded) -> None:
        """Send a message whole, or not at all. Returns at once."""
        self._send()
        if self._unsent:
            self.dropped += 1
            return
        topic = item.topic.encode()
        self._unsent = _HEAD.pack(len(item.message), len(topic), item.t_ns) + topic + item.message
        self._send()

    def _send(self) -> None:
        """As much of what is begun as the pipe takes."""
        if not self._unsent:
            return
        try:
            self._unsent = self._unsent[os.write(self._fd, self._unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            return  # the view is gone: what is begun stays unsent, so that everything else is dropped


def read_pipe(stream: BinaryIO) -> Iterator[Encoded]:
    """What comes through the pipe, until its end; of a message that was begun and not ended there is nothing."""
    while len(head := stream.read(_HEAD.size)) == _HEAD.size:
        message_bytes, topic_bytes, t_ns = _HEAD.unpack(head)
        topic, message = stream.read(topic_bytes), stream.read(message_bytes)
        if len(message) == message_bytes:
            yield Encoded(topic.decode(), message, t_ns)
