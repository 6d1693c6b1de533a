"""`onbeat bench loop`: how late ticks start and how many are missed, beside other ways to write a control loop.

Everything is measured in one run, in turn, in the same process and under the same load: a thread that burns the
interpreter and a policy that infers without a pause. Every loop ticks, exchanges with the joints and keeps the same
deadlines; they differ in how they wait and in who runs them. At 200 Hz the joints are the twin's paced servo bus, at
1 kHz actuators behind a mailbox. cyclictest, where it is installed, says what this machine can do at best.
"""

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from onbeat.calibration.joints import load_joints
from onbeat.drivers.feetech.device import FeetechBus
from onbeat.drivers.feetech.fake import FakeBus
from onbeat.drivers.feetech.protocol import OK, SERVO_FAULT
from onbeat.drivers.interfaces import Actuators, JointState
from onbeat.drivers.twin.client import start_twin
from onbeat.runtime.bench_load import Load
from onbeat.runtime.bench_record import (
    ROUNDS,
    VIEW,
    WAYS,
    Recording,
    Samples,
    costs_as_text,
    judge_costs,
    run_slice,
)
from onbeat.runtime.command_line import HelpWithDefaults
from onbeat.runtime.link import Link, exchange, link_to, mailbox_link
from onbeat.runtime.loop import ControlLoop, compile_ahead, next_deadline
from onbeat.runtime.mailbox import StateHistory
from onbeat.runtime.measures import figure, text_table
from onbeat.runtime.profile.spread import Judgement
from onbeat.runtime.realtime import FIFO_PRIORITY, OF_LOOP
from onbeat.runtime.record import check_whole, take_ticks, undrained_tick_ring
from onbeat.runtime.robots import Robot, load_robot
from onbeat.runtime.run import DEFAULT_BUNDLE
from onbeat.runtime.tick import JointLimits, TickState, new_tick_state, tick

ROWS: Final = 16
SPIN_S: Final = 0.0005  # before a deadline, for the loop that sleeps and then spins
ONBEAT: Final = "onbeat"
FIFO: Final = "SCHED_FIFO"
DEFAULT: Final = "default"
FLOOR: Final = "cyclictest"
AIM_MISSED: Final = 0.005
AIM_OF_FLOOR: Final = 3.0
AIM_BELOW: Final = {"sleep": 50.0, "sleep, then spin": 10.0}

Wait = Callable[[int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One loop. Lateness: from a deadline to the start of its tick, us. missed: share of the deadlines, 0..1."""

    loop: str
    rate_hz: int
    scheduling: str
    ticks: int
    missed: float
    p50_us: float
    p99_us: float
    p999_us: float
    max_us: float
    faulty: int


def summarise(loop: str, rate_hz: int, scheduling: str, late_ns: NDArray[Any], missed: int, faulty: int) -> Row:
    """late_ns: (T,), of ticks that ran. missed: deadlines that passed unused. faulty: ticks whose exchange failed."""
    p50, p99, p999, longest = (np.percentile(late_ns, (50, 99, 99.9, 100)) / 1e3).tolist()
    share = missed / (missed + len(late_ns))
    return Row(loop, rate_hz, scheduling, len(late_ns), share, p50, p99, p999, longest, faulty)


def row_of(loop: str, rate_hz: int, samples: Samples) -> Row:
    """Of one way of recording, under FIFO."""
    return summarise(loop, rate_hz, FIFO, samples.all_ns, samples.missed, samples.faulty)


def load_entry_points(limits: JointLimits) -> None:
    """Have ready what loops in Python call, which the first call of each would take ticks for: nothing is driven."""
    state = new_tick_state(limits, rate_hz=100.0, rows=ROWS)
    tick(state, 0)
    exchange(mailbox_link(len(limits.q_min)), state.command_q, 0)
    next_deadline(0, 0, 1)


def sleep_until_due(due_ns: int) -> None:
    """What most Python loops do."""
    time.sleep(max(0, due_ns - time.monotonic_ns()) * 1e-9)


def sleep_then_spin(due_ns: int) -> None:
    """Sleep to shortly before the deadline, then look at the clock until it is there."""
    time.sleep(max(0.0, (due_ns - time.monotonic_ns()) * 1e-9 - SPIN_S))
    while time.monotonic_ns() < due_ns:
        pass


def lerobot_wait() -> Wait | None:
    """LeRobot's own helper for the rest of a period, or None where it is not installed."""
    try:
        helpers = importlib.import_module("lerobot.utils.robot_utils")
    except ImportError:
        return None
    helper = getattr(helpers, "precise_sleep", None) or helpers.busy_wait
    return lambda due_ns: helper(max(0.0, (due_ns - time.monotonic_ns()) * 1e-9))


def python_waits() -> dict[str, Wait]:
    """The loops beside ours, by name."""
    lerobot = lerobot_wait()
    waits: dict[str, Wait] = {"sleep": sleep_until_due, "sleep, then spin": sleep_then_spin}
    return waits if lerobot is None else {**waits, "LeRobot": lerobot}


def run_python_loop(wait: Wait, state: TickState, link: Link, seconds: float) -> tuple[list[int], int, int]:
    """The loop of `loop.py` in Python, without its records: (lateness of each tick in ns, deadlines missed, faulty)."""
    load_entry_points(state.limits)
    period_ns, late_ns, missed, faulty = round(state.period_s * 1e9), list[int](), 0, 0
    begin_ns = time.monotonic_ns()
    due_ns, ends_ns = begin_ns + period_ns, begin_ns + round(seconds * 1e9)
    while due_ns < ends_ns:
        wait(due_ns)
        start_ns = time.monotonic_ns()
        tick(state, due_ns)
        outcome = exchange(link, state.command_q, time.monotonic_ns())
        if outcome & 15 in (OK, SERVO_FAULT):
            state.measured_q[:] = link.wire.position_rad
        else:
            faulty += 1
        late_ns.append(start_ns - due_ns)
        due_ns, let_go = next_deadline(due_ns, time.monotonic_ns(), period_ns)
        missed += let_go
    return late_ns, missed, faulty


Costs = dict[int, dict[str, tuple[Judgement, ...]]]


class Bench:
    """The loops on one kind of joints at one rate."""

    def __init__(self, robot: Robot, actuators: Actuators, rate_hz: int, load: Load) -> None:
        self._robot, self._actuators, self._rate_hz, self._load = robot, actuators, rate_hz, load

    def measure(self, seconds: float) -> Iterator[Row]:
        """A row per loop and scheduling, each `seconds` long."""
        for scheduling in (DEFAULT, FIFO):
            yield in_thread(lambda s=scheduling: self._ours(s, seconds), scheduling)
            for name, wait in python_waits().items():
                yield in_thread(lambda n=name, w=wait, s=scheduling: self._theirs(n, w, s, seconds), scheduling)

    def _fresh_state(self) -> TickState:
        joints = len(self._robot.joints)
        state = new_tick_state(self._robot.limits, rate_hz=self._rate_hz, rows=ROWS)
        into = JointState(0, np.zeros(joints), np.zeros(joints), np.zeros(joints))
        self._actuators.read(into)
        state.measured_q[:] = into.position_rad
        self._load.fed = state
        return state

    def record_costs(self, seconds: float) -> dict[str, Samples]:
        """Our loop under FIFO in the WAYS of bench_record, `seconds` each in slices, round after round."""
        samples = {way: Samples() for way in WAYS}
        with tempfile.TemporaryDirectory() as folder:
            for k in range(ROUNDS * len(WAYS)):
                way = WAYS[(k + k // len(WAYS)) % len(WAYS)]  # each round begins with another
                loop = self._new_loop(seconds / ROUNDS)
                recording = Recording(self._robot, self._load.spec, Path(folder) / str(k), is_viewed=way == VIEW)
                run = partial(in_thread, partial(run_for, loop, seconds / ROUNDS), FIFO)
                samples[way].add(run_slice(way, loop, run, recording), loop)
        return samples

    def _new_loop(self, seconds: float) -> ControlLoop:
        joints = len(self._robot.joints)
        records = undrained_tick_ring(joints, rate_hz=self._rate_hz, seconds=seconds)
        return ControlLoop(self._fresh_state(), self._actuators, history=StateHistory(joints), records=records)

    def _ours(self, scheduling: str, seconds: float) -> Row:
        loop = self._new_loop(seconds)
        run_for(loop, seconds)
        ticks = check_whole(take_ticks(loop.records), loop.status.ticks)
        late_ns = ticks["start_ns"] - ticks["due_ns"]
        return summarise(ONBEAT, self._rate_hz, scheduling, late_ns, loop.status.missed, loop.status.faulty_ticks)

    def _theirs(self, name: str, wait: Wait, scheduling: str, seconds: float) -> Row:
        state = self._fresh_state()
        with link_to(self._actuators, rate_hz=self._rate_hz) as linked:
            late_ns, missed, faulty = run_python_loop(wait, state, linked.link, seconds)
        return summarise(name, self._rate_hz, scheduling, np.array(late_ns), missed, faulty)


def run_for(loop: ControlLoop, seconds: float) -> None:
    """Run a loop in this thread for that long. Raises what the loop does."""
    timer = threading.Timer(seconds, loop.stop)
    timer.start()
    try:
        loop.run()
    finally:
        timer.cancel()
        timer.join()


def in_thread(measure: Callable[[], T], scheduling: str) -> T:
    """What `measure` returns, from a thread of its own that is scheduled so. Raises what it raises."""

    def work() -> T:
        if scheduling == FIFO:
            for ask in OF_LOOP.values():
                ask()
        return measure()

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def measure_floor(rate_hz: int, seconds: float) -> Row | None:
    """cyclictest on the loop's processor under the same load, or None where it is not installed or not permitted."""
    command = shutil.which(FLOOR)
    if command is None:
        return None
    where = ["-a", str(max(os.sched_getaffinity(0))), "-p", str(FIFO_PRIORITY)]
    how_long = ["-i", str(1_000_000 // rate_hz), "-D", str(max(1, round(seconds)))]
    command_line = [command, "-q", "-m", "-h", "100000", *where, *how_long]
    ran = subprocess.run(command_line, capture_output=True, text=True, check=False)
    return None if ran.returncode else read_histogram(ran.stdout, rate_hz)


def read_histogram(text: str, rate_hz: int) -> Row:
    """The row of cyclictest's `-h` output: lines of microseconds and how often, then its own summary."""
    pairs = [(int(us), int(count)) for us, count in re.findall(r"^(\d+)\s+(\d+)\s*$", text, re.MULTILINE)]
    late_us = np.repeat([us for us, _ in pairs], [count for _, count in pairs])
    return summarise(FLOOR, rate_hz, FIFO, late_us * 1000, 0, 0)


def compare(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What was aimed at, per rate, with what was measured: {aim, rate_hz, measured, is_met}."""
    found = {(row.loop, row.rate_hz, row.scheduling): row for row in rows}
    verdicts = []
    for rate_hz in sorted({row.rate_hz for row in rows}):
        ours = found[ONBEAT, rate_hz, FIFO]
        verdicts.append(_verdict(f"missed at most {AIM_MISSED:.1%}", rate_hz, ours.missed, ours.missed <= AIM_MISSED))
        floor = found.get((FLOOR, rate_hz, FIFO))
        if floor is not None:
            ratio = ours.p99_us / floor.p99_us
            verdicts.append(_verdict(f"p99 at most {AIM_OF_FLOOR:g} x {FLOOR}", rate_hz, ratio, ratio <= AIM_OF_FLOOR))
        for loop, aim in AIM_BELOW.items():
            ratio = found[loop, rate_hz, FIFO].p99_us / ours.p99_us
            verdicts.append(_verdict(f"p99 at least {aim:g} x below '{loop}'", rate_hz, ratio, ratio >= aim))
    return verdicts


def _verdict(aim: str, rate_hz: int, measured: float, is_met: bool) -> dict[str, Any]:
    return {"aim": f"{aim}, {FIFO}", "rate_hz": rate_hz, "measured": measured, "is_met": bool(is_met)}


def as_text(rows: Sequence[Row], verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Two tables: what was measured, and what it was aimed at."""
    header = ("loop", "Hz", "scheduling", "ticks", "missed %", "p50 us", "p99 us", "p99.9 us", "max us", "faulty")
    cells = [
        (
            row.loop,
            str(row.rate_hz),
            row.scheduling,
            str(row.ticks),
            figure(row.missed * 100),
            *(figure(value, 0) for value in (row.p50_us, row.p99_us, row.p999_us, row.max_us)),
            str(row.faulty),
        )
        for row in sorted(rows, key=lambda row: (row.rate_hz, row.scheduling))
    ]
    aims = [(v["aim"], str(v["rate_hz"]), f"{v['measured']:.3g}", "met" if v["is_met"] else "missed") for v in verdicts]
    return f"{text_table(header, cells)}\n\n{text_table(('aim', 'Hz', 'measured', ''), aims)}"


@contextmanager
def twin_bus(robot: Robot) -> Iterator[FeetechBus]:
    """The paced bus of a twin without cameras."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        twin = running.enter_context(start_twin(folder, has_cameras=False, attempt_timeout_s=1e6))
        joints = load_joints(Path(robot.config.calibration), robot.joints)
        yield running.enter_context(FeetechBus(twin.port, joints))


def measure_all(bundle: Path, seconds: float) -> tuple[list[Row], Costs]:
    """Every row, in one run, and what recording costs, per rate. Raises BundleError, TwinFailed."""
    robot, rows, costs = load_robot("so101-twin"), list[Row](), Costs()
    load = Load(bundle, robot)
    compile_ahead(robot.limits)
    with twin_bus(robot) as bus, load:
        mailbox = FakeBus(robot.joints)
        mailbox.enable(True)
        joints: tuple[tuple[Actuators, int], ...] = ((bus, 200), (mailbox, 1000))
        for actuators, rate_hz in joints:
            bench = Bench(robot, actuators, rate_hz, load)
            rows += bench.measure(seconds)
            samples = bench.record_costs(seconds)
            rows += (row_of(f"{ONBEAT}, {way}", rate_hz, found) for way, found in samples.items())
            costs[rate_hz] = judge_costs(samples)
            floor = measure_floor(rate_hz, seconds)
            rows += [] if floor is None else [floor]
    return rows, costs


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0 when it measured, whatever it found."""
    parser = argparse.ArgumentParser(prog="onbeat bench loop", formatter_class=HelpWithDefaults)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="the policy that infers meanwhile")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each loop, s")
    parser.add_argument("--json", action="store_true", dest="is_json", help="print JSON")
    options = parser.parse_args(argv)
    machine = f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}"
    load_before = os.getloadavg()[0]
    rows, costs = measure_all(options.bundle, options.seconds)
    verdicts = compare(rows)
    if options.is_json:
        told = {rate: {way: [asdict(j) for j in found] for way, found in ways.items()} for rate, ways in costs.items()}
        found = {"rows": [asdict(r) for r in rows], "aims": verdicts, "recording": told}
        print(json.dumps({"machine": machine, "load": load_before, **found}))
        return 0
    print(f"{machine}, load before {load_before:.1f}; {options.seconds:g} s per loop, beside a thread that burns the")
    print("interpreter and a policy that never pauses\n")
    print(as_text(rows, verdicts))
    print(f"\nwhat recording and watching cost the loop, {FIFO}\n\n{costs_as_text(costs)}")
    for missing, what in ((lerobot_wait() is None, "lerobot"), (shutil.which(FLOOR) is None, FLOOR)):
        if missing:
            print(f"{what} is not installed: left out", file=sys.stderr)
    return 0
