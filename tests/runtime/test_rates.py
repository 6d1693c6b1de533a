"""One policy rate on any loop rate: the same chunks give the same path, whatever the loop's period."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onbeat.runtime.tick import JointLimits, new_tick_state, tick
from onbeat.runtime.timeline import committed_target, publish

ROWS = 16
FREE = JointLimits(*(np.full(1, bound) for bound in (-10.0, 10.0, 50.0, 2000.0, 1e12)))


def drive(rows: np.ndarray, *, policy_hz: float, loop_hz: float) -> tuple[np.ndarray, np.ndarray]:
    """Times (K,) in s and commands (K,) of a chunk of slow rows."""
    state = new_tick_state(FREE, rate_hz=loop_hz, rows=ROWS)
    state.measured_q[:] = rows[0]
    period_ns, tick_ns = round(1e9 / policy_hz), round(1e9 / loop_hz)
    publish(state.timeline, rows[:, None], t0_ns=0, period_ns=period_ns, now_ns=0)
    times = np.arange(0, (ROWS - 1) * period_ns, tick_ns)
    commands = np.empty(len(times))
    for k, now_ns in enumerate(times):
        tick(state, int(now_ns))
        commands[k] = state.command_q[0]
    return times / 1e9, commands


@settings(max_examples=60, deadline=None)
@given(policy_hz=st.floats(5, 50), loop_hz=st.floats(50, 1000), seed=st.integers(0, 2**32 - 1))
def test_commands_lie_on_the_line_through_the_rows(policy_hz: float, loop_hz: float, seed: int):
    """Up to the first ticks: the limits let it follow rows that are a hundredth apart within a period or two."""
    rows = np.cumsum(np.random.default_rng(seed).uniform(-0.01, 0.01, ROWS))
    t_s, commands = drive(rows, policy_hz=policy_hz, loop_hz=loop_hz)
    expected = np.interp(t_s * 1e9, np.arange(ROWS) * round(1e9 / policy_hz), rows)
    fastest = np.abs(np.diff(rows)).max() * policy_hz
    assert np.abs(commands - expected).max() <= 2.1 * fastest / loop_hz + fastest**2 / 2000


@pytest.mark.parametrize("policy_hz", [5, 10, 50])
@pytest.mark.parametrize("loop_hz", [50, 100, 333, 1000])
def test_rows_are_looked_up_by_time_and_not_by_counting_ticks(policy_hz: int, loop_hz: int):
    state = new_tick_state(FREE, rate_hz=loop_hz, rows=ROWS)
    period_ns, out = 10**9 // policy_hz, np.zeros(1)
    publish(state.timeline, np.arange(ROWS)[:, None] / 2, t0_ns=0, period_ns=period_ns, now_ns=0)
    for now_ns in range(0, (ROWS - 1) * period_ns, 10**9 // loop_hz):
        committed_target(state.timeline, now_ns, out)
        assert out[0] == pytest.approx(now_ns / period_ns / 2, abs=1e-9)
