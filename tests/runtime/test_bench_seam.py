"""The bench of seams: what it measures is what happened, and its rows differ for the reasons they should."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from onbeat.runtime import bench_seam
from onbeat.runtime.bench_seam import Setting, Traced, best_lag, flow_to, go_on_from, main, measure, path, run_queue
from onbeat.runtime.engine import Guidance
from onbeat.runtime.robots import load_robot

ROBOT = load_robot("so101-twin")
RATE_HZ = ROBOT.config.loop_rate_hz


@pytest.fixture(autouse=True)
def _without_lerobot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lerobot", None)


def test_only_sync_jumps_and_no_mode_breaks_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seconds", "15", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["mode"]: row for row in told["rows"]}
    assert list(rows) == ["sync", "async", "locked", "guided"]
    assert "not asked" in told["note"]
    assert all(row["command_rad_s2"] <= 20 * (1 + 1e-6) for row in rows.values())
    assert all(row["seams"] >= 5 for row in rows.values())
    assert min(rows["sync"]["target_rad"] / rows[mode]["target_rad"] for mode in ("async", "locked", "guided")) > 5
    assert rows["locked"]["target_rad_s"] < rows["async"]["target_rad_s"]
    assert rows["sync"]["held_percent"] > 5 > rows["async"]["held_percent"]
    assert rows["sync"]["lag_ms"] > rows["async"]["lag_ms"]


def test_a_policy_period_that_no_tick_falls_on_has_frames_as_well() -> None:
    thirty_hz = replace(ROBOT, embodiment=replace(ROBOT.embodiment, policy_period_ms=1000 / 30))
    trace = bench_seam.run_mode(thirty_hz, Setting(seconds=3.0), "async")
    assert trace.seams.sum() > 15
    assert trace.held < len(trace.target) / 10


def test_the_table_says_why_a_row_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seconds", "3"]) == 0
    out = capsys.readouterr().out
    assert "LeRobot's ActionQueue was not asked" in out
    assert "speed step, rad/s" in out


class TestMeasure:
    def trace(self, command: np.ndarray, seam: int) -> Traced:
        return Traced(command, command, np.arange(len(command)) == seam, held=0)

    def command(self) -> np.ndarray:
        return path(ROBOT, np.arange(400)[:, None] / RATE_HZ)

    def test_a_step_at_a_seam_is_found_and_one_elsewhere_is_not(self):
        for where, size in ((200, 0.3), (300, 0.0)):
            command = self.command()
            command[where:, 2] += 0.3
            row = measure(ROBOT, "x", self.trace(command, 200))
            assert row.target_rad == pytest.approx(size, abs=0.02)

    def test_a_lag_is_found_to_the_tick(self):
        t_s = (np.arange(1600)[:, None] - 13) / RATE_HZ
        lag, error = best_lag(ROBOT, path(ROBOT, t_s))
        assert (lag, error) == (13, pytest.approx(0, abs=1e-12))


class TestModelPolicy:
    def test_locked_rows_are_kept_and_the_disagreement_fades(self):
        own, locked = np.zeros((16, 2)), np.ones((3, 2))
        rows = go_on_from(own, locked)
        assert rows[:3].tolist() == locked.tolist()
        assert (np.diff(rows[2:, 0]) < 0).all()
        assert rows[-1, 0] < 0.1

    def test_guidance_of_nothing_is_its_own_plan(self):
        own = np.random.default_rng(0).normal(size=(16, 2))
        found = flow_to(own, np.ones((16, 2)), Guidance(np.zeros(16, np.float32), 4.0))
        np.testing.assert_allclose(found, own, atol=1e-12)

    def test_guidance_comes_closer_by_its_weight(self):
        weights = np.linspace(1, 0, 16, dtype=np.float32)
        found = flow_to(np.zeros((16, 1)), np.ones((16, 1)), Guidance(weights, 4.0))[:, 0]
        assert (np.diff(found) < 0).all()
        assert found[0] == pytest.approx(10 / 12)


def test_a_queue_is_given_delays_rounded_up_and_asked_once_a_period() -> None:
    """A queue that keeps what it is told and gives nothing: the robot stays."""
    merged: list[int] = []
    asked: list[None] = []
    queue = SimpleNamespace(
        cfg=SimpleNamespace(enabled=True),
        empty=lambda: True,
        get_action_index=lambda: 0,
        merge=lambda _, __, delay, ___: merged.append(delay),
        get=lambda: asked.append(None),
    )
    setting = Setting(seconds=6.0)
    trace = run_queue(ROBOT, setting, queue, lambda rows: rows)
    takes = bench_seam.latencies_ns(setting, ROBOT.policy_period_ns, 600)[: len(merged)] / ROBOT.policy_period_ns
    assert len(asked) == 60
    assert merged == [math.ceil(math.ceil(delay * RATE_HZ / 10) * 10 / RATE_HZ) for delay in takes]
    assert (trace.command == trace.command[0]).all()
