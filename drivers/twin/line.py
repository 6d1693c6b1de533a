"""A pty with servos at its far end. Bytes come in at once, as on any pty; replies go out as late as on a wire."""

import os
import select
import time
import tty
from collections import deque
from contextlib import suppress
from typing import Protocol

from onbeat.drivers.twin.servos import Answer

_READ_SIZE = 4096


class FarEnd(Protocol):
    """What answers on the line."""

    def feed(self, data: bytes, now_ns: int = 0) -> Answer: ...


class ServoLine:
    """One bus. `port` is what a client opens, another after every `plug`. paced: replies wait for the wire's time."""

    def __init__(self, far_end: FarEnd, *, paced: bool = True) -> None:
        self._far_end = far_end
        self._paced = paced
        self._due: deque[tuple[int, bytes]] = deque()
        self._free_ns = 0
        self.plug()

    def plug(self) -> None:
        """Open a new pty; the servos are as they were."""
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        self.port = os.ttyname(self._slave)
        self._due.clear()

    @property
    def is_plugged(self) -> bool:
        return self._master >= 0

    def serve_until(self, deadline_ns: int, grace_ns: int = 0) -> None:
        """Take bytes and send due replies until the clock reads deadline_ns; looks at the port once at least.

        Stays for a reply that is due not later than grace_ns after the deadline.
        """
        while True:
            wait_ns = self._wake_ns(deadline_ns, grace_ns) - time.monotonic_ns()
            open_ports = [self._master] if self.is_plugged else []
            ready, _, _ = select.select(open_ports, [], [], max(0, wait_ns) * 1e-9)
            if ready:
                self._take(os.read(self._master, _READ_SIZE))
            self._send_due()
            if time.monotonic_ns() >= max(deadline_ns, self._wake_ns(deadline_ns, grace_ns)):
                return

    def close(self) -> None:
        """Hang up: a client sees its port gone. Closing twice is harmless."""
        if self.is_plugged:
            os.close(self._master)
            os.close(self._slave)
            self._master = self._slave = -1
            self._due.clear()

    def _wake_ns(self, deadline_ns: int, grace_ns: int) -> int:
        due_ns = self._due[0][0] if self._due else deadline_ns
        return due_ns if due_ns <= deadline_ns + grace_ns else deadline_ns

    def _take(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        answer = self._far_end.feed(data, now_ns)
        self._free_ns = max(self._free_ns, now_ns) + (answer.wire_ns if self._paced else 0)
        if answer.data:
            self._due.append((self._free_ns, answer.data))

    def _send_due(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic_ns():
            with suppress(BlockingIOError):  # nobody reads: a wire does not wait either
                os.write(self._master, self._due.popleft()[1])
