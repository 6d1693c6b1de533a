"""The figures of decision 0008: how long the twin's thread does not look at its port, and how late its replies are.

One process at ordinary priority, no cameras, goals and states of six servos at 200 Hz. Run from the repository root:
python docs/decisions/0008_twin_processes.py (--fsync beside a process that keeps the disk busy)
"""

import argparse
import multiprocessing
import os
import select
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from onbeat.drivers.feetech.packets import reference_goals, reference_request
from onbeat.drivers.twin import line, serve
from onbeat.drivers.twin.world import World

IDS = [1, 2, 3, 4, 5, 6]
TICK_NS = 5_000_000
SETTLING = 20  # of each figure, left out


class Client:
    """Asks at every tick, in the twin's own thread: it stands where `select` does, and sees each look at the port."""

    def __init__(self, port: str) -> None:
        self.unseen_ns: list[int] = []
        self._fd = os.open(port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        self._looked_ns = self._next_ns = time.monotonic_ns()

    def select(self, ports: list[int], _writers: Any, _errors: Any, timeout_s: float) -> Any:
        now_ns = time.monotonic_ns()
        self.unseen_ns.append(now_ns - self._looked_ns)
        if now_ns >= self._next_ns:
            self._next_ns += TICK_NS
            self._ask(now_ns)
        left_s = max(0, self._next_ns - time.monotonic_ns()) * 1e-9
        seen = select.select(ports, [], [], min(timeout_s, left_s))
        self._looked_ns = time.monotonic_ns()
        return seen

    def _ask(self, now_ns: int) -> None:
        if select.select([self._fd], [], [], 0)[0]:
            os.read(self._fd, 4096)
        steps = [2048 + round(150 * np.sin(now_ns * 4e-9 + j)) for j in IDS]
        os.write(self._fd, reference_goals(IDS, steps) + reference_request(IDS))


class WatchedLine(line.ServoLine):
    """Notes how long after its time each reply is sent."""

    late_ns: list[int]

    def _send_due(self) -> None:
        due_ns, replies = (self._due[0][0] if self._due else 0), len(self._due)
        super()._send_due()
        if len(self._due) < replies:
            self.late_ns.append(time.monotonic_ns() - due_ns)


def measure(seconds: float, folder: Path) -> dict[str, list[int]]:
    WatchedLine.late_ns = []
    serve.ServoLine, serve.claim_realtime = WatchedLine, lambda _priority: False
    settings = serve.TwinSettings(0, folder, has_cameras=False, attempt_timeout_s=3.0)
    with closing(serve.Twin(World(0), settings)) as twin:
        client, stop = Client(twin.port), threading.Event()
        line.select = SimpleNamespace(select=client.select)
        threading.Timer(seconds, stop.set).start()
        twin.run(stop)
    return {"port not looked at": client.unseen_ns, "reply after its time": WatchedLine.late_ns}


def sync_for_ever(path: Path) -> None:
    megabyte = os.urandom(1 << 20)
    with path.open("wb", buffering=0) as file:
        while True:
            file.seek(0)
            for _ in range(8):
                file.write(megabyte)
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--fsync", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        busy = multiprocessing.Process(target=sync_for_ever, args=(Path(folder) / "synced",))
        if options.fsync:
            busy.start()
        figures = measure(options.seconds, Path(folder))
        if options.fsync:
            busy.kill()
            busy.join()
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    for name, durations_ns in figures.items():
        p50, p99, longest = np.percentile(durations_ns[SETTLING:], (50, 99, 100)) / 1e6
        print(f"{name:22} ms  n {len(durations_ns)}  p50 {p50:.2f}  p99 {p99:.2f}  max {longest:.2f}")


if __name__ == "__main__":
    main()
