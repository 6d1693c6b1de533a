"""`onbeat bench tick`: what each step of a tick takes, beside what it may take.

`BUDGET` is the one table of what a tick may cost; `drivers/feetech/pace.py` sets aside for it what a servo bus must
leave. Measured on the loop itself, with nothing else running: on the twin's paced bus at 200 Hz and on actuators behind
a mailbox at 1 kHz. The parts of the computation, too short to be timed inside a tick, are timed by themselves.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.fake import FakeBus
from onbeat.drivers.interfaces import Actuators
from onbeat.kernels.clock import new_timespec
from onbeat.runtime.bench_loop import twin_bus
from onbeat.runtime.bench_tick_parts import time_faults, time_look_up, time_ticks
from onbeat.runtime.command_line import HelpWithDefaults
from onbeat.runtime.loop import ControlLoop, compile_ahead
from onbeat.runtime.mailbox import StateHistory
from onbeat.runtime.measures import figure, text_table
from onbeat.runtime.realtime import prepare_loop, prepare_process
from onbeat.runtime.record import check_whole, take_ticks, undrained_tick_ring
from onbeat.runtime.robots import Robot, load_robot
from onbeat.runtime.tick import TickState, new_tick_state
from onbeat.runtime.timeline import publish

BUS: Final = "servo bus"
MAILBOX: Final = "mailbox"
ROWS: Final = 16
CALLS: Final = 20_000
SWAY_RAD: Final = 0.2


@dataclass(frozen=True, slots=True)
class Step:
    """One step. allowed_us: at the 99th percentile. on: the joints it is measured on, "" for by itself."""

    name: str
    allowed_us: float
    what: str
    on: tuple[str, ...] = (BUS, MAILBOX)


BUDGET: Final = (
    Step("wake", 200.0, "from the deadline to the first instruction"),
    Step("compute", 100.0, "tick: look up, faults, limits, check"),
    Step("exchange", 3500.0, "goals out, joints in, at 1 Mbaud", on=(BUS,)),
    Step("exchange", 30.0, "goals out, newest joints in", on=(MAILBOX,)),
    Step("tell", 50.0, "joints, record and progress to who watches"),
    Step("look up", 5.0, "of compute: the chunk in force and its row", on=()),
    Step("faults", 10.0, "of compute: the fault table", on=()),
    Step("whole tick", 60.0, "of compute: all of it", on=()),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """A step as it was measured, us. joints: BUS, MAILBOX, or "" for a part by itself."""

    step: str
    joints: str
    allowed_us: float
    n: int
    p50_us: float
    p99_us: float
    max_us: float

    @property
    def is_within(self) -> bool:
        return self.p99_us <= self.allowed_us


def cost_of(step: Step, joints: str, samples_ns: NDArray[Any]) -> Cost:
    """samples_ns: (N,)."""
    p50, p99, longest = np.percentile(samples_ns, (50, 99, 100)) / 1e3
    return Cost(step.name, joints, step.allowed_us, len(samples_ns), float(p50), float(p99), float(longest))


def loop_costs(robot: Robot, actuators: Actuators, joints: str, rate_hz: int, seconds: float) -> Iterator[Cost]:
    """The steps of real ticks."""
    ticks = record_ticks(robot, actuators, rate_hz, seconds)
    samples = {
        "wake": ticks["start_ns"] - ticks["due_ns"],
        "compute": ticks["compute_ns"],
        "exchange": ticks["exchange_ns"],
        "tell": ticks["tell_ns"][1:],
    }
    for step in BUDGET:
        if joints in step.on:
            yield cost_of(step, joints, samples[step.name])


def record_ticks(robot: Robot, actuators: Actuators, rate_hz: int, seconds: float) -> NDArray[np.void]:
    """Run the loop with everything that helps it, on chunks that keep the arm moving; returns its ticks.

    Raises LoopFault, PortLost, TicksLost.
    """
    state = new_tick_state(robot.limits, rate_hz=rate_hz, rows=ROWS, workspace=robot.workspace(), settings=robot.safety)
    joints = len(robot.joints)
    records = undrained_tick_ring(joints, rate_hz=rate_hz, seconds=seconds)
    loop = ControlLoop(state, actuators, history=StateHistory(joints), records=records)
    loop.read_first()

    def work() -> None:
        prepare_process()
        prepare_loop()
        loop.run()

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(work)
        while loop.status.ticks == 0 and not running.done():
            time.sleep(0.01)
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s and not running.done():
            feed(state, robot)
            time.sleep(robot.policy_period_ns / 1e9)
        loop.stop()
        running.result()
    return check_whole(take_ticks(records), loop.status.ticks)


def feed(state: TickState, robot: Robot) -> None:
    """A chunk that sways every joint round the middle of its range."""
    now_ns, period_ns = time.monotonic_ns(), robot.policy_period_ns
    phase = (now_ns / 1e9 + np.arange(ROWS) * period_ns / 1e9)[:, None]
    middle = (robot.limits.q_min + robot.limits.q_max) / 2
    targets = middle + SWAY_RAD * np.sin(phase * np.ones(len(robot.joints)))
    publish(state.timeline, targets, t0_ns=now_ns, period_ns=period_ns, now_ns=now_ns)


def part_costs(robot: Robot) -> Iterator[Cost]:
    """The parts of the computation, one after the other by themselves."""
    state = new_tick_state(robot.limits, rate_hz=1000, rows=ROWS, workspace=robot.workspace(), settings=robot.safety)
    state.measured_q[:] = (robot.limits.q_min + robot.limits.q_max) / 2
    feed(state, robot)
    timers = {"look up": time_look_up, "faults": time_faults, "whole tick": time_ticks}
    for step in BUDGET:
        if not step.on:
            samples_ns = np.zeros(CALLS, np.int64)
            timers[step.name](state, time.monotonic_ns(), samples_ns[:1], new_timespec())
            timers[step.name](state, time.monotonic_ns(), samples_ns, new_timespec())
            yield cost_of(step, "", samples_ns)


def measure_all(seconds: float) -> list[Cost]:
    """Every row of the budget. Raises TwinFailed."""
    robot = load_robot("so101-twin")
    compile_ahead(robot.limits)
    mailbox = FakeBus(robot.joints)
    mailbox.enable(True)
    costs = [*part_costs(robot), *loop_costs(robot, mailbox, MAILBOX, 1000, seconds)]
    with twin_bus(robot) as bus:
        costs += loop_costs(robot, bus, BUS, 200, seconds)
    return costs


def as_text(costs: Sequence[Cost]) -> str:
    """The table."""
    what = {(step.name, joints): step.what for step in BUDGET for joints in step.on or ("",)}
    cells = [
        (
            cost.step,
            cost.joints or "by itself",
            *(figure(value, 1) for value in (cost.allowed_us, cost.p50_us, cost.p99_us, cost.max_us)),
            "yes" if cost.is_within else "NO",
            what[cost.step, cost.joints],
        )
        for cost in costs
    ]
    return text_table(("step", "joints", "allowed us", "p50 us", "p99 us", "max us", "within", "what it is"), cells)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0 when every step is within its budget at the 99th percentile, else 1."""
    parser = argparse.ArgumentParser(prog="onbeat bench tick", formatter_class=HelpWithDefaults)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each loop, s")
    parser.add_argument("--json", action="store_true", dest="is_json", help="print JSON")
    options = parser.parse_args(argv)
    costs = measure_all(options.seconds)
    print(json.dumps([{**asdict(c), "is_within": c.is_within} for c in costs]) if options.is_json else as_text(costs))
    return 0 if all(cost.is_within for cost in costs) else 1
