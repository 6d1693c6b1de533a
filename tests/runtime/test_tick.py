"""The tick from outside: bad input first, then what a sequence of commands looks like, then what it costs."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onbeat.kernels.limit import HELD, POSITION
from onbeat.runtime.tick import (
    REFUSED,
    STARTED,
    JointLimits,
    TickState,
    _is_safe,
    flag_names,
    new_tick_state,
    tick,
)
from onbeat.runtime.timeline import EMPTY, publish

TICK_NS = 10_000_000
PERIOD_NS = 100_000_000
LIMITS = JointLimits(*(np.full(2, bound) for bound in (-1.0, 1.0, 2.0, 20.0, np.inf)))


@pytest.fixture
def state() -> TickState:
    fresh = new_tick_state(LIMITS, rate_hz=100, rows=16)
    fresh.measured_q[:] = [0.3, -0.2]
    return fresh


def run(state: TickState, ticks: int, start_ns: int = 0) -> np.ndarray:
    """The commands (ticks, J)."""
    commands = []
    for k in range(ticks):
        tick(state, start_ns + k * TICK_NS)
        commands.append(state.command_q.copy())
    return np.array(commands)


class TestBadInput:
    def test_no_measurement_means_no_command(self, state: TickState):
        state.measured_q[1] = np.nan
        assert tick(state, 0) & REFUSED
        assert np.isnan(state.command_q).all()
        assert state.counters.refused[0] == 1

    def test_it_starts_as_soon_as_there_is_one(self, state: TickState):
        state.measured_q[1] = np.nan
        tick(state, 0)
        state.measured_q[1] = -0.2
        assert tick(state, TICK_NS) == STARTED
        assert state.command_q.tolist() == [0.3, -0.2]

    def test_a_command_that_turned_bad_is_not_sent(self, state: TickState):
        run(state, 3)
        state.command_v[0] = np.inf
        assert tick(state, 3 * TICK_NS) & REFUSED
        assert state.command_q.tolist() == [0.3, -0.2]
        assert state.command_v.tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("target", [np.inf, -np.inf, 1e30])
    def test_an_absurd_chunk_moves_nothing(self, state: TickState, target: float):
        assert publish(state.timeline, np.full((16, 2), target), t0_ns=0, period_ns=PERIOD_NS, now_ns=0) < 0
        assert (run(state, 150) == [0.3, -0.2]).all()

    def test_one_that_overreaches_a_little_is_cut_to_the_range(self, state: TickState):
        publish(state.timeline, np.full((16, 2), 1.2), t0_ns=0, period_ns=PERIOD_NS, now_ns=0)
        assert run(state, 150).max() == 1.0

    def test_a_chunk_with_nan_holds(self, state: TickState):
        publish(state.timeline, np.full((16, 2), np.nan), t0_ns=0, period_ns=PERIOD_NS, now_ns=0)
        commands = run(state, 20)
        assert (commands == [0.3, -0.2]).all()
        assert state.record["flags"][0] & HELD


class TestLastCheck:
    """On its own, for `limit` before it lets none of these through."""

    @pytest.mark.parametrize(
        ("before", "after", "is_safe"),
        [
            (0.99, 1.0, True),
            (0.99, 1.001, False),
            (-0.99, -1.001, False),
            (1.2, 1.19, True),
            (1.2, 1.201, False),
            (0.0, 0.02, True),
            (0.0, 0.0201, False),
            (0.0, np.nan, False),
            (np.nan, 1.5, True),
        ],
    )
    def test_refuses_what_leaves_the_range_or_jumps(
        self, state: TickState, before: float, after: float, is_safe: bool
    ):
        state.command_q[:], state.next_q[:] = before, after
        state.command_v[:] = state.next_v[:] = (after - before) / state.period_s
        assert _is_safe(state) is is_safe


class TestStart:
    def test_the_first_command_is_the_measured_position(self, state: TickState):
        publish(state.timeline, np.full((16, 2), 0.9), t0_ns=0, period_ns=PERIOD_NS, now_ns=0)
        assert tick(state, 0) == STARTED
        assert state.command_q.tolist() == [0.3, -0.2]
        assert state.command_v.tolist() == [0.0, 0.0]

    def test_with_no_chunk_it_holds_there(self, state: TickState):
        assert (run(state, 50) == [0.3, -0.2]).all()
        assert state.counters.held[0] == 49
        assert state.record["chunk_id"][0] == EMPTY

    def test_a_later_measurement_does_not_move_the_command(self, state: TickState):
        run(state, 5)
        state.measured_q[:] = 0.7
        assert (run(state, 5) == [0.3, -0.2]).all()

    def test_an_arm_outside_its_range_starts_where_it_is_and_may_only_come_in(self, state: TickState):
        state.measured_q[:] = [1.1, -0.2]
        publish(state.timeline, np.full((16, 2), 0.0), t0_ns=0, period_ns=PERIOD_NS, now_ns=0)
        commands = run(state, 100)
        assert commands[0, 0] == 1.1
        assert (np.diff(commands[:, 0]) <= 1e-15).all()
        assert commands[-1, 0] == pytest.approx(0.0, abs=1e-12)


class TestRecord:
    def test_says_where_the_command_came_from(self, state: TickState):
        publish(state.timeline, np.zeros((16, 2)), t0_ns=-PERIOD_NS, period_ns=PERIOD_NS, now_ns=0)
        run(state, 2)
        tick(state, 250_000_000)
        record = state.record[0]
        assert (record["t_ns"], record["chunk_id"], record["row"]) == (250_000_000, 0, 3)
        assert record["fraction"] == 0.5
        assert record["age_ns"] == 350_000_000

    def test_names_what_shaped_the_command(self, state: TickState):
        publish(state.timeline, np.full((16, 2), 1.2), t0_ns=0, period_ns=PERIOD_NS, now_ns=0)
        run(state, 3)
        assert state.record["flags"][0] & POSITION
        assert "velocity limit" in flag_names(state.record["flags"][0])
        assert state.counters.limited[0] == 2


def test_follows_a_slow_chunk_exactly(state: TickState):
    rows = np.linspace([0.3, -0.2], [0.35, -0.15], 16)
    publish(state.timeline, rows, t0_ns=0, period_ns=PERIOD_NS, now_ns=0)
    run(state, 100)
    lag_s = 0.02  # speed 1/30 rad/s: at 20 rad/s^2 the limiter's own lag is below a period
    assert np.abs(state.command_q - rows[9] - 0.9 * (rows[10] - rows[9])).max() < lag_s / 30


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    arrivals=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 1500), st.integers(0, 6)), max_size=8),
)
def test_no_schedule_of_chunks_breaks_a_limit(seed: int, arrivals: list[tuple[int, int, int]]):
    """arrivals: (ticks until published, latency in ms, locked rows) of chunks that disagree by up to 2.4 rad."""
    rng = np.random.default_rng(seed)
    state, now_ns = new_tick_state(LIMITS, rate_hz=100, rows=16), 0
    state.measured_q[:] = rng.uniform(-1, 1, 2)
    commands = [state.measured_q.copy()]
    for ticks, latency_ms, locked in arrivals:
        commands += list(run(state, ticks, now_ns))
        now_ns += ticks * TICK_NS
        targets = rng.uniform(-1.2, 1.2, (16, 2))
        targets[rng.random(16) < 0.01] = np.nan
        t0_ns = now_ns - latency_ms * 1_000_000
        publish(state.timeline, targets, t0_ns=t0_ns, period_ns=PERIOD_NS, now_ns=now_ns, locked_rows=locked)
    commands += list(run(state, 200, now_ns))
    speed = np.diff(commands, axis=0) / 0.01
    assert np.abs(commands).max() <= 1.0
    assert np.abs(speed).max() <= 2.0 * (1 + 1e-9)
    assert np.abs(np.diff(speed, axis=0, prepend=0.0)).max() <= 0.2 * (1 + 1e-9) + 1e-9
    assert state.counters.refused[0] == 0


def test_costs_far_less_than_a_millisecond(state: TickState):
    """6 us measured; 200 us leaves room for a machine whose two cores are taken."""
    run(state, 10)
    started = time.perf_counter_ns()
    for k in range(1000):
        tick(state, k * TICK_NS)
    assert (time.perf_counter_ns() - started) / 1000 < 200_000
