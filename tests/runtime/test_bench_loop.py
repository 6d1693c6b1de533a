"""The bench of loops: its figures from known input, its verdicts, and one short run of what it compares."""

import subprocess
import sys
import time

import numpy as np
import pytest

from onbeat.drivers.feetech.fake import FakeBus
from onbeat.kernels.clock import monotonic_ns, new_timespec
from onbeat.runtime import bench
from onbeat.runtime.bench_loop import (
    DEFAULT,
    FIFO,
    FLOOR,
    ONBEAT,
    Row,
    as_text,
    compare,
    in_thread,
    python_waits,
    read_histogram,
    run_python_loop,
    summarise,
)
from onbeat.runtime.link import link_to
from onbeat.runtime.loop import compile_ahead
from onbeat.runtime.robots import load_robot
from onbeat.runtime.tick import new_tick_state

pytestmark = pytest.mark.alone

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


@pytest.mark.parametrize("name", ["sleep", "sleep, then spin"])
def test_the_loops_beside_ours_keep_the_same_deadlines(name: str):
    robot = load_robot("so101-twin")
    compile_ahead(robot.limits)
    monotonic_ns(new_timespec())
    state = new_tick_state(robot.limits, rate_hz=200, rows=2)
    state.measured_q[:] = 0.0
    with link_to(FakeBus(robot.joints), rate_hz=200) as linked:
        started_ns = time.monotonic_ns()
        late_ns, missed, _ = run_python_loop(python_waits()[name], state, linked.link, started_ns + 300_000_000)
    assert min(late_ns) >= 0
    assert 55 <= len(late_ns) + missed <= 61
    assert state.counters.ticks[0] == len(late_ns)


def test_what_a_measurement_raises_comes_out():
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: row("x", 1 / 0), DEFAULT)
