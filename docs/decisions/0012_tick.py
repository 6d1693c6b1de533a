"""What a tick costs, what a publish costs, and how late a thread wakes: the figures of 0012-tick.md.

python docs/decisions/0012_tick.py
"""

import os
import threading
import time
from collections.abc import Callable

import numpy as np

from onbeat.kernels.limit import limit_reference
from onbeat.runtime.measures import text_table
from onbeat.runtime.realtime import FIFO_PRIORITY
from onbeat.runtime.robots import load_robot
from onbeat.runtime.tick import new_tick_state, tick
from onbeat.runtime.timeline import publish

CALLS = 20_000
WAITS = 600
PERIOD_NS = 10_000_000


def main() -> None:
    rows = [("tick", *time_calls(tick_calls())), ("publish", *time_calls(publish_calls(), 2000))]
    rows.append(("limit, NumPy reference", *time_calls(reference_calls(), 2000)))
    print(text_table(("us", "p50", "p99", "max"), rows), "\n")
    waits = [(name, *time_waits(spin, is_fifo)) for name, spin, is_fifo in WAYS_TO_WAIT]
    print(text_table(("lateness, us", "p50", "p95", "p99", "max"), waits))
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")


WAYS_TO_WAIT = (
    ("sleep", 0, False),
    ("sleep, then spin 150 us", 150_000, False),
    ("sleep, SCHED_FIFO", 0, True),
    ("sleep, then spin 150 us, SCHED_FIFO", 150_000, True),
    ("sleep, then spin 500 us, SCHED_FIFO", 500_000, True),
)


def tick_calls() -> Callable[[int], object]:
    robot = load_robot("so101-twin")
    state = new_tick_state(robot.limits, rate_hz=100, rows=16)
    state.measured_q[:] = 0.0
    for k in range(3):
        publish(state.timeline, np.full((16, 6), 0.5), t0_ns=k, period_ns=robot.policy_period_ns, now_ns=k)
    return lambda k: tick(state, k * 20_000)


def publish_calls() -> Callable[[int], object]:
    state, targets = new_tick_state(load_robot("so101-twin").limits, rate_hz=100, rows=16), np.zeros((16, 6))
    return lambda k: publish(state.timeline, targets, t0_ns=k, period_ns=100_000_000, now_ns=k)


def reference_calls() -> Callable[[int], object]:
    limits, zeros = load_robot("so101-twin").limits, np.zeros(6)
    return lambda _: limit_reference(zeros, zeros, zeros + 0.5, *limits[:4], 0.01)


def time_calls(call: Callable[[int], object], calls: int = CALLS) -> list[str]:
    """p50, p99 and max of one call, us."""
    call(0)
    spent = np.empty(calls)
    for k in range(calls):
        started_ns = time.perf_counter_ns()
        call(k)
        spent[k] = time.perf_counter_ns() - started_ns
    return [f"{value / 1e3:.1f}" for value in np.percentile(spent, (50, 99, 100))]


def wait_until(due_ns: int, spin_ns: int) -> None:
    """Sleep to `spin_ns` before the deadline, then look at the clock until it is there."""
    time.sleep(max(0, due_ns - time.monotonic_ns() - spin_ns) * 1e-9)
    while time.monotonic_ns() < due_ns:
        pass


def time_waits(spin_ns: int, is_fifo: bool) -> list[str]:
    """p50, p95, p99 and max of how late a wait returns in a thread of its own, us."""
    late: list[int] = []

    def wait_on() -> None:
        if is_fifo:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(FIFO_PRIORITY))
        due_ns = time.monotonic_ns() + PERIOD_NS
        for _ in range(WAITS):
            wait_until(due_ns, spin_ns)
            late.append(time.monotonic_ns() - due_ns)
            due_ns += PERIOD_NS

    thread = threading.Thread(target=wait_on)
    thread.start()
    thread.join()
    return [f"{value / 1e3:.0f}" for value in np.percentile(late, (50, 95, 99, 100))]


if __name__ == "__main__":
    main()
