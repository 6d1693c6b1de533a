"""How long an exchange with the twin takes, and how much of a core the twin needs. One table.

python -m onbeat.drivers.twin.measure --seconds 10
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.device import BusSettings, FeetechBus, JointCalibration
from onbeat.drivers.interfaces import JointState
from onbeat.drivers.twin.client import RunningTwin, start_twin
from onbeat.drivers.twin.records import read_goals

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
TICK_NS = 10_000_000
PATIENT = BusSettings(timeout_ms=1000.0)  # a busy machine shows in `max`, not as a fault


def main(argv: Sequence[str] | None = None) -> int:
    """Measure unpaced, paced, and paced with cameras."""
    parser = argparse.ArgumentParser(prog="python -m onbeat.drivers.twin.measure", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each line, at 100 Hz (default %(default)s)")
    ticks = round(parser.parse_args(argv).seconds * 1e9 / TICK_NS)
    cores = os.cpu_count()
    print(f"{platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    print(f"exchange = goals of 6 servos + position, velocity, load of 6 servos; 100 Hz, n = {ticks}, warm-up 50; us")
    print(f"{'':24}{'p50':>8}{'p95':>8}{'p99':>8}{'max':>8}{'faults':>8}{'bus core %':>12}{'cameras core %':>16}")
    for name, is_paced, has_cameras in (
        ("unpaced", False, False),
        ("paced, 1 Mbaud", True, False),
        ("paced, 2 x 112 px, 10 Hz", True, True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name:24}{_measure(Path(folder), ticks, is_paced=is_paced, has_cameras=has_cameras)}", flush=True)
    return 0


def _measure(folder: Path, ticks: int, *, is_paced: bool, has_cameras: bool) -> str:
    with start_twin(folder, is_paced=is_paced, has_cameras=has_cameras, attempt_timeout_s=1e6) as twin:
        joints = {name: JointCalibration(servo_id) for servo_id, name in enumerate(JOINTS, start=1)}
        with FeetechBus(twin.port, joints, PATIENT) as bus:
            _drive(bus, 50)
            before = _cpu_ns(twin), time.monotonic_ns()
            durations = _drive(bus, ticks)
            after = _cpu_ns(twin), time.monotonic_ns()
            faults = sum(n for name, n in bus.faults().items() if name != "ok")
    assert len(read_goals(folder)) >= ticks
    shares = (after[0] - before[0]) / (after[1] - before[1]) * 100
    p50, p95, p99, longest = np.percentile(durations, (50, 95, 99, 100)) / 1e3
    cameras = f"{shares[1]:16.1f}" if has_cameras else f"{'-':>16}"
    return f"{p50:8.0f}{p95:8.0f}{p99:8.0f}{longest:8.0f}{faults:8}{shares[0]:12.1f}{cameras}"


def _drive(bus: FeetechBus, ticks: int) -> NDArray[np.int64]:
    """Move gently at 100 Hz; returns how long each exchange took, (ticks,) ns."""
    state = JointState(0, np.zeros(6), np.zeros(6), np.zeros(6))
    bus.read(state)
    start_rad, durations = state.position_rad.copy(), np.zeros(ticks, np.int64)
    next_ns = time.monotonic_ns()
    for tick in range(ticks):
        goal_rad = start_rad + 0.1 * np.sin(tick / 100)
        begin_ns = time.monotonic_ns()
        bus.exchange(goal_rad, state)
        durations[tick] = time.monotonic_ns() - begin_ns
        next_ns += TICK_NS
        time.sleep(max(0, next_ns - time.monotonic_ns()) * 1e-9)
    return durations


def _cpu_ns(twin: RunningTwin) -> NDArray[np.int64]:
    """CPU time of the bus process and of its children so far, (2,), from the scheduler: ticks are too coarse."""
    children = Path(f"/proc/{twin.pid}/task/{twin.pid}/children").read_text().split()
    return np.array([_scheduled_ns(str(twin.pid)), sum(_scheduled_ns(pid) for pid in children)])


def _scheduled_ns(pid: str) -> int:
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks)


if __name__ == "__main__":
    sys.exit(main())
