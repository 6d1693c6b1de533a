"""Which chunk is in force when, what a seam looks like, and what never happens to a late chunk."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onbeat.runtime.timeline import EMPTY, LATE, Timeline, close, committed_target, find_slot, new_timeline, publish

PERIOD_NS = 100_000_000


def put(timeline: Timeline, value: float | np.ndarray, *, t0_ns: int, now_ns: int, rows: int = 8, locked_rows: int = 0):
    """Publish a chunk of one joint whose rows are all `value`, or the given rows."""
    targets = np.full((rows, 1), value) if np.isscalar(value) else np.asarray(value, float).reshape(-1, 1)
    return publish(timeline, targets, t0_ns=t0_ns, period_ns=PERIOD_NS, now_ns=now_ns, locked_rows=locked_rows)


def target_at(timeline: Timeline, at_ns: int) -> float:
    out = np.zeros(1)
    committed_target(timeline, at_ns, out)
    return out[0]


def chunk_at(timeline: Timeline, at_ns: int) -> int:
    slot = find_slot(timeline, at_ns)
    return EMPTY if slot == EMPTY else int(timeline.chunk_id[slot])


@pytest.fixture
def timeline() -> Timeline:
    return new_timeline(rows=16, joints=1)


class TestBadInput:
    def test_nothing_is_due_on_an_empty_ring(self, timeline: Timeline):
        assert np.isnan(target_at(timeline, 10**9))

    def test_a_chunk_whose_rows_are_all_past_is_counted_and_ignored(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0, rows=16)
        assert put(timeline, 2.0, t0_ns=0, now_ns=8 * PERIOD_NS) == LATE
        assert timeline.late[0] == 1
        assert target_at(timeline, 9 * PERIOD_NS) == 1.0

    def test_more_rows_than_a_slot_holds_is_a_programmers_error(self, timeline: Timeline):
        with pytest.raises(AssertionError):
            put(timeline, 1.0, t0_ns=0, now_ns=0, rows=17)

    def test_the_end_of_the_last_chunk_is_the_end(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0)
        assert target_at(timeline, 8 * PERIOD_NS - 1) == 1.0
        assert np.isnan(target_at(timeline, 8 * PERIOD_NS))


    def test_a_closed_timeline_has_nothing_due_and_takes_nothing(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0)
        close(timeline)
        assert put(timeline, 1.0, t0_ns=0, now_ns=0) == LATE
        assert np.isnan(target_at(timeline, PERIOD_NS))


class TestFirstChunk:
    def test_starts_at_its_next_row(self, timeline: Timeline):
        assert put(timeline, np.arange(8.0), t0_ns=0, now_ns=250_000_000) == 3
        assert np.isnan(target_at(timeline, 299_999_999))
        assert target_at(timeline, 300_000_000) == 3.0

    def test_a_row_due_now_is_not_past(self, timeline: Timeline):
        assert put(timeline, np.arange(8.0), t0_ns=0, now_ns=2 * PERIOD_NS) == 2

    def test_may_start_in_the_future(self, timeline: Timeline):
        assert put(timeline, 1.0, t0_ns=5 * PERIOD_NS, now_ns=0) == 0
        assert np.isnan(target_at(timeline, 5 * PERIOD_NS - 1))

    def test_so_does_one_that_comes_after_the_old_one_ended(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0, rows=2)
        assert put(timeline, 2.0, t0_ns=PERIOD_NS, now_ns=250_000_000) == 2
        assert np.isnan(target_at(timeline, 299_999_999))
        assert target_at(timeline, 300_000_000) == 2.0


class TestSeam:
    def test_old_rows_before_new_rows_from_it_on(self, timeline: Timeline):
        put(timeline, np.arange(16.0), t0_ns=0, now_ns=0)
        first = put(timeline, np.arange(16.0) + 100, t0_ns=2 * PERIOD_NS, now_ns=350_000_000)
        assert first == 3
        assert chunk_at(timeline, 4 * PERIOD_NS - 1) == 0
        assert chunk_at(timeline, 4 * PERIOD_NS) == 1
        executed = [target_at(timeline, k * PERIOD_NS) for k in range(2, 8)]
        assert executed == [2.0, 3.0, 4.0, 103.0, 104.0, 105.0]

    def test_locked_rows_put_it_where_the_policy_expects_it(self, timeline: Timeline):
        put(timeline, np.arange(16.0), t0_ns=0, now_ns=0)
        assert put(timeline, 100.0, t0_ns=PERIOD_NS, now_ns=150_000_000, locked_rows=4) == 4
        assert [target_at(timeline, k * PERIOD_NS) for k in range(1, 7)] == [1.0, 2.0, 3.0, 4.0, 100.0, 100.0]

    def test_a_lock_shorter_than_the_latency_moves_the_seam_and_not_the_robot(self, timeline: Timeline):
        put(timeline, np.arange(16.0), t0_ns=0, now_ns=0)
        assert put(timeline, 100.0, t0_ns=PERIOD_NS, now_ns=350_000_000, locked_rows=2) == 4

    def test_of_two_chunks_at_once_the_newer_runs(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0)
        put(timeline, 2.0, t0_ns=0, now_ns=50_000_000)
        put(timeline, 3.0, t0_ns=0, now_ns=50_000_000)
        assert target_at(timeline, 3 * PERIOD_NS) == 3.0

    def test_a_burst_never_overwrites_the_chunk_in_force(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0, rows=16)
        for _ in range(9):
            put(timeline, 2.0, t0_ns=0, now_ns=50_000_000)
        assert target_at(timeline, 50_000_000) == 1.0
        assert target_at(timeline, 2 * PERIOD_NS) == 2.0


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), latencies=st.lists(st.integers(1, 600), min_size=2, max_size=8))
def test_a_target_never_jumps_while_chunks_follow_each_other(seed: int, latencies: list[int]):
    """Row-to-row steps are at most 2 here, so over 1 ms a continuous path moves at most 2 / 100.

    Up to 600 ms the chunk before always has rows left: where it has none, the new one starts with a step.
    """
    rng, timeline, now_ns = np.random.default_rng(seed), new_timeline(rows=16, joints=1), 0
    path: list[float] = []
    for latency_ms in latencies:
        t0_ns, end_ns = now_ns, now_ns + latency_ms * 1_000_000
        path += [target_at(timeline, at) for at in range(now_ns, end_ns, 1_000_000)]
        now_ns = end_ns
        put(timeline, rng.uniform(-1, 1, 16), t0_ns=t0_ns, now_ns=now_ns)
    steps = np.abs(np.diff(path))
    assert np.nanmax(steps, initial=0.0) <= 2 / 100 + 1e-12
