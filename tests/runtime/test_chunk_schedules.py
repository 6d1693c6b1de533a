"""Random schedules of everything that can happen to chunks, through the real compiled tick, judged from the commands.

A schedule is a life of one robot: chunks that disagree, come late by any number of rows or never, hold NaN or absurd
targets, come from old or future observations, two at once or in bursts, and a policy that falls silent and starts
anew. What is judged is position, speed, acceleration and jerk by differences of the commands, nothing the code says.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit

from onbeat.kernels.compiled import STAMP
from onbeat.runtime.tick import JointLimits, TickState, new_tick_state, tick
from onbeat.runtime.timeline import EMPTY, NEVER, REFUSALS, commit_chunk

ROWS, JOINTS, TICKS = 12, 2, 300
SLACK = 1e-9  # rounding of positions of about 1 rad, in rad; in rad/s over a period it is SLACK / dt
LATE, BAD, ABSURD, OLD, FUTURE, TWICE, BURST, KINDS = range(8)
LIMITS = {
    "so101": JointLimits(
        np.array([-1.9, -0.2]), np.array([1.9, 1.7]), np.full(2, 3.0), np.full(2, 20.0), np.full(2, np.inf)
    ),
    "smooth": JointLimits(
        np.array([-1.0, -0.5]), np.array([0.4, 2.0]), np.array([0.5, 4.0]), np.array([5.0, 60.0]), np.full(2, 400.0)
    ),
}
LOOP_RATES_HZ = (50, 100, 250, 1000)


@njit
def start_anew(state):
    """The state before its first tick, at a random place inside the range."""
    timeline = state.timeline
    timeline.sequence[:] = 0
    timeline.chunk_id[:] = EMPTY
    timeline.newest_t0_ns[0] = timeline.progress_ns[0] = NEVER
    timeline.published[0] = timeline.closed[0] = 0
    state.command_q[:] = np.nan
    state.command_v[:] = 0.0
    state.command_a[:] = 0.0
    for fault in range(state.safety.status.shape[0]):
        state.safety.status[fault].age = state.safety.status[fault].lasts = state.safety.status[fault].level = 0
        state.safety.inputs.conditions[fault] = 0
    for j in range(state.measured_q.shape[0]):
        state.measured_q[j] = np.random.uniform(state.limits.q_min[j], state.limits.q_max[j])


@njit
def fill_rows(state, rows):
    """A wandering path, a constant, or points anywhere, up to 0.2 rad outside the range."""
    style = np.random.randint(3)
    for j in range(rows.shape[1]):
        low, high = state.limits.q_min[j] - 0.2, state.limits.q_max[j] + 0.2
        rows[0, j] = np.random.uniform(low, high)
        for k in range(1, rows.shape[0]):
            step = np.random.normal() * 0.2 if style == 0 else 0.0
            rows[k, j] = np.random.uniform(low, high) if style == 2 else min(max(rows[k - 1, j] + step, low), high)


@njit
def publish_one(state, rows, now_ns, period_ns, kind, counts):
    """One event; counts what became of it: by kind, then accepted, then by the reason of the refusal."""
    fill_rows(state, rows)
    length = np.random.randint(2, rows.shape[0] + 1)
    t0_ns = now_ns - np.random.randint(0, 14 * period_ns) // np.random.randint(1, 15)
    if kind == BAD:
        rows[np.random.randint(length), np.random.randint(rows.shape[1])] = (
            np.nan if np.random.random() < 0.5 else np.inf
        )
    elif kind == ABSURD:
        rows[np.random.randint(length), np.random.randint(rows.shape[1])] = 10.0
    elif kind == OLD:
        t0_ns = now_ns - np.random.randint(0, 40 * period_ns)
    elif kind == FUTURE:
        t0_ns = now_ns + np.random.randint(1, 40 * period_ns)
    locked, blend = np.random.randint(0, rows.shape[0]), np.random.randint(0, 5)
    first_row = commit_chunk(
        state.timeline, rows[:length], t0_ns, period_ns, now_ns, locked * np.random.randint(2), blend
    )
    counts[kind] += 1
    counts[KINDS + max(0, -first_row)] += 1


@njit
def live(state, commands, rows, counts):
    """One schedule: commands (TICKS, J)."""
    start_anew(state)
    tick_ns = round(state.period_s * 1e9)
    period_ns = np.random.randint(max(20_000_000, 2 * tick_ns), 200_000_001)
    period_ns = min(period_ns, 30 * tick_ns)
    now_ns, chance = np.random.randint(0, 10**12), (0.02, 0.1, 0.4)[np.random.randint(3)]
    for k in range(commands.shape[0]):
        if np.random.random() < chance:
            kind = np.random.randint(KINDS)
            times = 2 if kind == TWICE else np.random.randint(3, 8) if kind == BURST else 1
            for _ in range(times):
                publish_one(state, rows, now_ns + np.random.randint(0, tick_ns), period_ns, kind, counts)
        if np.random.random() < 0.002:
            state.timeline.closed[0] = 1
        tick(state, now_ns)
        commands[k] = state.command_q
        now_ns += tick_ns if np.random.random() < 0.98 else tick_ns * np.random.randint(2, 6)


@njit
def judge(commands, q_min, q_max, dt):
    """How far outside (rad) and the largest |speed|, |acceleration|, |jerk| per joint, from rest: (4, J)."""
    worst = np.zeros((4, commands.shape[1]))
    for j in range(commands.shape[1]):
        q, v, a = commands[0, j], 0.0, 0.0
        for k in range(1, commands.shape[0]):
            next_v = (commands[k, j] - q) / dt
            next_a = (next_v - v) / dt
            outside = max(q_min[j] - commands[k, j], commands[k, j] - q_max[j])
            for n, value in enumerate((outside, abs(next_v), abs(next_a), abs(next_a - a) / dt)):
                worst[n, j] = max(worst[n, j], value)
            q, v, a = commands[k, j], next_v, next_a
    return worst


def kept(function: Callable[..., int]) -> Any:
    """Compiled and kept on disk until this file or anything compiled that it calls changes."""
    dispatcher: Any = njit(cache=True)(function)
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    dispatcher._cache._cache_file._source_stamp = STAMP + own
    return dispatcher


@kept
def run_schedules(state, seed, count, counts, worst):
    """Run `count` schedules; `worst` (4, J) collects what `judge` says. Returns the schedules that moved."""
    np.random.seed(seed)
    commands, rows, moved = np.empty((TICKS, JOINTS)), np.empty((ROWS, JOINTS)), 0
    for _ in range(count):
        live(state, commands, rows, counts)
        worst[:] = np.maximum(worst, judge(commands, state.limits.q_min, state.limits.q_max, state.period_s))
        moved += np.abs(commands - commands[0]).max() > 1e-3
    return moved


def check(name: str, rate_hz: int, schedules: int, seed: int) -> None:
    limits = LIMITS[name]
    state: TickState = new_tick_state(limits, rate_hz=rate_hz, rows=ROWS)
    counts, worst = np.zeros(KINDS + 1 + len(REFUSALS), np.int64), np.zeros((4, JOINTS))
    moved = run_schedules(state, seed, schedules, counts, worst)
    outside, speed, acceleration, jerk = worst
    told = f"{name} at {rate_hz} Hz, seed {seed}"
    assert (outside <= SLACK).all(), told
    assert (speed <= limits.v_max * (1 + 1e-9) + SLACK * rate_hz).all(), (told, speed)
    assert (acceleration <= limits.a_max * (1 + 1e-9) + 2 * SLACK * rate_hz**2).all(), (told, acceleration)
    assert (jerk <= limits.j_max * (1 + 1e-9) + 4 * SLACK * rate_hz**3).all(), (told, jerk)
    assert state.counters.refused[0] == 0, told
    assert moved > schedules / 2, "most schedules move the arm"
    assert (counts >= schedules // 100).all(), f"{told}: every kind and every refusal happens: {counts}"
    assert acceleration[0] > 0.9 * limits.a_max[0], "and the limits matter"


@pytest.mark.parametrize("rate_hz", LOOP_RATES_HZ)
@pytest.mark.parametrize("name", LIMITS)
def test_no_schedule_breaks_a_limit(name: str, rate_hz: int) -> None:
    check(name, rate_hz, 400, seed=rate_hz)


@pytest.mark.slow
@pytest.mark.parametrize("rate_hz", LOOP_RATES_HZ)
@pytest.mark.parametrize("name", LIMITS)
def test_no_schedule_of_a_hundred_thousand_breaks_a_limit(name: str, rate_hz: int) -> None:
    """8 x 13,000 schedules, 31 million ticks."""
    check(name, rate_hz, 13_000, seed=1000 + rate_hz)


def test_the_judge_sees_a_jump() -> None:
    commands = np.zeros((10, 2))
    commands[5:, 1] = 0.01
    worst = judge(commands, np.full(2, -1.0), np.full(2, 1.0), 0.01)
    np.testing.assert_allclose(worst[:, 1], [0, 1.0, 100.0, 20000.0])
    assert (worst[:, 0] == 0).all()


if __name__ == "__main__":
    begun_s = time.monotonic()
    for which in LIMITS:
        for rate in LOOP_RATES_HZ:
            check(which, rate, 13_000, 1000 + rate)
            print(which, rate, f"{time.monotonic() - begun_s:.1f} s")
