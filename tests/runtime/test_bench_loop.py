"""The bench of loops: its figures from known input, its verdicts, and one short run of what it compares."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from onbeat.drivers.feetech.errors import PortLost
from onbeat.drivers.feetech.fake import FakeBus
from onbeat.drivers.feetech.protocol import NO_REPLY, OK, SERVO_FAULT
from onbeat.runtime import bench, bench_loop, record
from onbeat.runtime.bench_load import Load
from onbeat.runtime.bench_loop import (
    DEFAULT,
    FIFO,
    FLOOR,
    ONBEAT,
    Bench,
    Row,
    as_text,
    compare,
    in_thread,
    python_waits,
    read_histogram,
    run_python_loop,
    summarise,
)
from onbeat.runtime.link import Link, mailbox_link
from onbeat.runtime.loop import compile_ahead
from onbeat.runtime.mailbox import put_answer
from onbeat.runtime.record import TicksLost
from onbeat.runtime.robots import load_robot
from onbeat.runtime.tick import new_tick_state

pytestmark = pytest.mark.alone

ROBOT = load_robot("so101-twin")
LOADING_S = 0.1
HISTOGRAM = """# /dev/cpu_dma_latency set to 0us
000000 000000
000003 000098
000050 000001
000900 000001
# Total: 000000100
# Min Latencies: 00003
"""


def row(loop: str, p99_us: float, missed: float = 0.0, scheduling: str = FIFO) -> Row:
    return Row(loop, 200, scheduling, 1000, missed, p99_us / 2, p99_us, p99_us * 2, p99_us * 3, 0)


class TestUsage:
    @pytest.mark.parametrize("arguments", [[], ["nothing"], ["--loop"]])
    def test_an_unknown_bench_is_wrong_usage_and_the_benches_are_told(self, arguments, capsys):
        assert bench.main(arguments) == 2
        told = capsys.readouterr().err
        assert all(name in told for name in bench.BENCHES)

    def test_help_is_none(self, capsys):
        assert bench.main(["--help"]) == 0
        assert "onbeat bench NAME" in capsys.readouterr().out

    def test_a_bundle_that_is_not_there_is_said_with_a_remedy(self, tmp_path):
        command = [sys.executable, "-m", "onbeat", "bench", "loop", "--bundle", str(tmp_path / "none")]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 1
        assert "onbeat bench: " in ran.stderr


@pytest.fixture(scope="module")
def _compiled() -> None:
    compile_ahead(ROBOT.limits)


class TestFigures:
    def test_missed_is_a_share_of_all_deadlines(self):
        got = summarise("x", 200, DEFAULT, np.arange(75) * 1000, missed=25, faulty=3)
        assert (got.missed, got.ticks, got.faulty, got.max_us) == (0.25, 75, 3, 74.0)
        assert got.p50_us == 37.0

    def test_a_histogram_of_cyclictest_is_read(self):
        floor = read_histogram(HISTOGRAM, 1000)
        assert (floor.ticks, floor.p50_us, floor.max_us) == (100, 3.0, 900.0)
        assert 50.0 < floor.p99_us < 900.0

    def test_aims_are_judged_by_ratios_under_real_time_scheduling(self):
        rows = [row(ONBEAT, 100.0), row("sleep", 4999.0), row("sleep, then spin", 1000.0), row(FLOOR, 30.0)]
        verdicts = compare([*rows, row(ONBEAT, 10.0, scheduling=DEFAULT)])
        assert [v["is_met"] for v in verdicts] == [True, False, False, True]
        assert verdicts[1]["measured"] == pytest.approx(100 / 30)
        assert "missed" in as_text(rows, verdicts)

    def test_too_many_missed_ticks_are_no_success(self):
        rows = [row(ONBEAT, 1.0, missed=0.0051), row("sleep", 1000.0), row("sleep, then spin", 1000.0)]
        assert [v["is_met"] for v in compare(rows)] == [False, True, True]


@pytest.mark.usefixtures("_compiled")
class TestLoopsBesideOurs:
    @pytest.mark.parametrize("name", ["sleep", "sleep, then spin"])
    def test_keep_the_same_deadlines(self, name: str):
        late_ns, missed, _ = python_loop(name, answering(OK))
        assert min(late_ns) >= 0
        assert 55 <= len(late_ns) + missed <= 61

    @pytest.mark.parametrize(("outcome", "share"), [(OK, 0), (SERVO_FAULT | 3 << 4, 0), (NO_REPLY, 1)])
    def test_count_an_exchange_as_failed_when_ours_does(self, outcome: int, share: int):
        """A servo that tells a fault has answered (loop.py)."""
        late_ns, _, faulty = python_loop("sleep", answering(outcome))
        assert faulty == share * len(late_ns)

    def test_pay_for_no_loading_of_what_they_call(self, monkeypatch: pytest.MonkeyPatch):
        for name in ("tick", "exchange", "next_deadline"):
            monkeypatch.setattr(bench_loop, name, slow_at_first(getattr(bench_loop, name)))
        _, missed, _ = python_loop("sleep", answering(OK))
        assert missed < LOADING_S * 200


def answering(outcome: int) -> Link:
    """A link to actuators that answered so, and whose answer never gets old."""
    link, joints = mailbox_link(len(ROBOT.joints)), np.zeros(len(ROBOT.joints))
    put_answer(link.box, time.monotonic_ns() + 3600 * 10**9, outcome, joints, joints, joints)
    return link


def slow_at_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """As what is compiled is: its first call loads it."""
    calls = itertools.count()

    def call(*arguments: Any) -> Any:
        if next(calls) == 0:
            time.sleep(LOADING_S)
        return function(*arguments)

    return call


def python_loop(name: str, link: Link) -> tuple[list[int], int, int]:
    state = new_tick_state(ROBOT.limits, rate_hz=200, rows=2)
    state.measured_q[:] = 0.0
    found = run_python_loop(python_waits()[name], state, link, 0.3)
    assert state.counters.ticks[0] == len(found[0])
    return found


@pytest.mark.usefixtures("_compiled")
class TestOurs:
    def test_ticks_that_were_lost_are_an_error(self, monkeypatch: pytest.MonkeyPatch):
        assert next(bench_of(1000).measure(0.3)).loop == ONBEAT
        monkeypatch.setattr(record, "SPARE_S", -0.29)
        with pytest.raises(TicksLost):
            next(bench_of(1000).measure(0.3))

    def test_one_that_fails_leaves_nobody_waiting_to_end_it(self):
        before = threading.active_count()
        with pytest.raises(PortLost):
            next(bench_of(1000, PulledOut(ROBOT.joints)).measure(60.0))
        assert threading.active_count() == before


class PulledOut(FakeBus):
    """Can be read, and is gone when goals come."""

    def write(self, goal_rad: NDArray[np.float64]) -> None:
        self.goals.append(goal_rad)
        raise PortLost("pulled out")


def bench_of(rate_hz: int, actuators: FakeBus | None = None) -> Bench:
    """On actuators behind a mailbox, without a load."""
    bus = FakeBus(ROBOT.joints) if actuators is None else actuators
    bus.enable(True)
    return Bench(ROBOT, bus, rate_hz, cast(Load, SimpleNamespace(fed=None)))


def test_what_a_measurement_raises_comes_out():
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: row("x", 1 / 0), DEFAULT)
