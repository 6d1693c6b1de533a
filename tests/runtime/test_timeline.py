"""Which chunk is in force when, what a seam looks like, and what never happens to a late chunk."""

import threading
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import njit

from onbeat.kernels.atomics import load_acquire
from onbeat.runtime.timeline import (
    CLOSED,
    EMPTY,
    EXPIRED,
    NEVER,
    NOT_FINITE,
    OUTSIDE,
    REFUSALS,
    STALE,
    Timeline,
    chunks_in_sight,
    close,
    commit_chunk,
    committed_target,
    committed_target_of,
    find_slot,
    is_pending,
    new_timeline,
    publish,
    refusals,
    remembered_target,
)

PERIOD_NS = 100_000_000


def put(timeline: Timeline, value: float | np.ndarray, *, t0_ns: int, now_ns: int, rows: int = 8, **how: int):
    """Publish a chunk of one joint whose rows are all `value`, or the given rows."""
    targets = np.full((rows, 1), value) if np.isscalar(value) else np.asarray(value, float).reshape(-1, 1)
    return publish(timeline, targets, t0_ns=t0_ns, period_ns=PERIOD_NS, now_ns=now_ns, **how)


def target_at(timeline: Timeline, at_ns: int) -> float:
    out = np.zeros(1)
    committed_target(timeline, at_ns, out)
    return out[0]


def chunk_at(timeline: Timeline, at_ns: int) -> int:
    slot = find_slot(timeline, at_ns)
    return EMPTY if slot == EMPTY else int(timeline.chunk_id[slot])


@pytest.fixture
def timeline() -> Timeline:
    return new_timeline(rows=16, joints=1, slots=4)


class TestBadInput:
    def test_nothing_is_due_on_an_empty_ring(self, timeline: Timeline):
        assert np.isnan(target_at(timeline, 10**9))

    def test_a_chunk_whose_rows_are_all_past_is_counted_and_ignored(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0, rows=16)
        assert put(timeline, 2.0, t0_ns=0, now_ns=8 * PERIOD_NS) == EXPIRED
        assert refusals(timeline)["expired"] == 1
        assert target_at(timeline, 9 * PERIOD_NS) == 1.0

    def test_an_empty_slot_is_minus_one_as_recorded_ticks_say_it(self, timeline: Timeline):
        assert committed_target(timeline, 0, np.zeros(1))[0] == EMPTY == -1

    def test_who_knows_of_fewer_chunks_sees_the_older_one(self, timeline: Timeline):
        for k in range(3):
            put(timeline, float(k), t0_ns=k * PERIOD_NS, now_ns=k * PERIOD_NS)
        seen = [committed_target_of(timeline, count, 5 * PERIOD_NS, np.zeros(1))[0] for count in range(4)]
        assert seen == [EMPTY, 0, 1, 2]

    def test_no_chunk_is_in_sight_once_they_are_withdrawn(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0)
        before = chunks_in_sight(timeline)
        close(timeline)
        assert (before, chunks_in_sight(timeline)) == (1, 0)

    def test_a_chunk_remembers_how_far_the_ticks_were_also_when_it_is_refused(self, timeline: Timeline):
        timeline.progress_ns[0] = 7
        put(timeline, np.nan, t0_ns=0, now_ns=0)
        timeline.progress_ns[0] = 9
        assert timeline.met_ns[0] == 7

    def test_where_nothing_is_due_there_is_no_chunk_no_time_and_no_row(self, timeline: Timeline):
        assert committed_target(timeline, 0, np.zeros(1)) == (EMPTY, NEVER, EMPTY, 0.0)
        assert find_slot(timeline, 10**9) == EMPTY

    def test_words_that_are_shared_are_one_each(self, timeline: Timeline):
        words = (timeline.newest_t0_ns, timeline.published, timeline.closed, timeline.progress_ns, timeline.met_ns)
        assert [word.shape for word in (*words, *timeline.sequence)] == [(1,)] * (5 + len(timeline.chunk_id))

    def test_two_slots_are_enough_for_one_chunk_after_the_other(self):
        timeline = new_timeline(16, 1, slots=2)
        for k in range(5):
            assert put(timeline, float(k), t0_ns=k * PERIOD_NS, now_ns=k * PERIOD_NS) >= 0
        assert target_at(timeline, 8 * PERIOD_NS) == 4.0

    def test_a_chunk_whose_last_row_is_the_next_to_come_has_none_of_its_own(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0, rows=16)
        assert put(timeline, 2.0, t0_ns=0, now_ns=7 * PERIOD_NS) == EXPIRED
        assert put(timeline, 2.0, t0_ns=0, now_ns=6 * PERIOD_NS) == 7

    def test_a_chunk_without_rows_is_a_programmers_error(self, timeline: Timeline):
        with pytest.raises(AssertionError):
            publish(timeline, np.zeros((0, 1)), t0_ns=0, period_ns=PERIOD_NS, now_ns=0)

    def test_one_row_is_a_chunk(self, timeline: Timeline):
        assert put(timeline, 1.0, t0_ns=0, now_ns=0, rows=1) == 0
        assert target_at(timeline, PERIOD_NS - 1) == 1.0

    def test_a_chunk_is_pending_until_its_seam_has_come(self, timeline: Timeline):
        assert not any(is_pending(timeline, now_ns) for now_ns in (-1, 0, 1))
        put(timeline, 1.0, t0_ns=0, now_ns=50_000_000)
        assert is_pending(timeline, PERIOD_NS - 1)
        assert not is_pending(timeline, PERIOD_NS)
        put(timeline, 1.0, t0_ns=0, now_ns=150_000_000)
        assert is_pending(timeline, 2 * PERIOD_NS - 1)
        assert not is_pending(timeline, 2 * PERIOD_NS)

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
        assert put(timeline, 1.0, t0_ns=0, now_ns=0) == CLOSED
        assert np.isnan(target_at(timeline, PERIOD_NS))

    @pytest.mark.parametrize("row", [0, 7])
    @pytest.mark.parametrize(
        ("value", "why"), [(np.nan, NOT_FINITE), (np.inf, NOT_FINITE), (2.1, OUTSIDE), (-2.1, OUTSIDE)]
    )
    def test_one_bad_row_and_the_whole_chunk_is_refused(self, row: int, value: float, why: int):
        timeline = new_timeline(16, 1, lowest=np.array([-2.0]), highest=np.array([2.0]))
        put(timeline, 1.0, t0_ns=0, now_ns=0)
        rows = np.linspace(-2.0, 2.0, 8)
        rows[row] = value
        assert put(timeline, rows, t0_ns=0, now_ns=1) == why
        assert refusals(timeline)[REFUSALS[why]] == 1
        assert [target_at(timeline, k * PERIOD_NS) for k in range(8)] == [1.0] * 8
        assert put(timeline, np.linspace(-2.0, 2.0, 8), t0_ns=0, now_ns=1) == 2

    def test_an_observation_older_than_the_last_one_used_is_stale(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=100, now_ns=100)
        assert put(timeline, 2.0, t0_ns=99, now_ns=200) == STALE
        assert put(timeline, 2.0, t0_ns=100, now_ns=200) == 2
        assert refusals(timeline)["stale"] == 1

    def test_an_observation_of_the_future_is_stale_too(self, timeline: Timeline):
        """It would make every honest chunk after it the older one."""
        assert put(timeline, 1.0, t0_ns=1, now_ns=0) == STALE
        assert put(timeline, 1.0, t0_ns=0, now_ns=0) == 0


class TestFirstChunk:
    def test_starts_at_its_next_row(self, timeline: Timeline):
        assert put(timeline, np.arange(8.0), t0_ns=0, now_ns=250_000_000) == 3
        assert np.isnan(target_at(timeline, 299_999_999))
        assert target_at(timeline, 300_000_000) == 3.0

    def test_a_row_due_now_is_not_past(self, timeline: Timeline):
        assert put(timeline, np.arange(8.0), t0_ns=0, now_ns=2 * PERIOD_NS) == 2

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

    def test_a_lock_beyond_the_end_of_the_old_chunk_ends_there(self, timeline: Timeline):
        put(timeline, np.arange(4.0), t0_ns=0, now_ns=0)
        assert put(timeline, 100.0, t0_ns=PERIOD_NS, now_ns=150_000_000, locked_rows=6) == 3
        assert [target_at(timeline, k * PERIOD_NS) for k in range(1, 6)] == [1.0, 2.0, 3.0, 100.0, 100.0]

    def test_a_blend_fades_the_old_path_out(self, timeline: Timeline):
        put(timeline, 0.0, t0_ns=0, now_ns=0, rows=16)
        assert put(timeline, 1.0, t0_ns=0, now_ns=50_000_000, blend_rows=3) == 2
        assert [target_at(timeline, k * PERIOD_NS) for k in range(7)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]

    def test_a_chunk_that_comes_at_once_is_blended_from_its_second_row(self, timeline: Timeline):
        put(timeline, 0.0, t0_ns=0, now_ns=0, rows=16)
        assert put(timeline, 1.0, t0_ns=PERIOD_NS, now_ns=PERIOD_NS, blend_rows=1) == 1
        assert [target_at(timeline, k * PERIOD_NS) for k in (1, 2, 3)] == [0.0, 0.5, 1.0]

    def test_a_chunk_that_comes_within_its_lock_is_not_blended(self, timeline: Timeline):
        put(timeline, 0.0, t0_ns=0, now_ns=0, rows=16)
        assert put(timeline, 1.0, t0_ns=0, now_ns=50_000_000, locked_rows=2, blend_rows=3) == 2
        assert target_at(timeline, 2 * PERIOD_NS) == 1.0

    def test_one_that_exceeds_its_lock_is(self, timeline: Timeline):
        put(timeline, 0.0, t0_ns=0, now_ns=0, rows=16)
        assert put(timeline, 1.0, t0_ns=0, now_ns=150_000_000, locked_rows=2, blend_rows=3) == 3
        assert target_at(timeline, 3 * PERIOD_NS) == 0.25

    def test_of_two_chunks_at_once_the_newer_runs(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0)
        put(timeline, 2.0, t0_ns=0, now_ns=50_000_000)
        put(timeline, 3.0, t0_ns=0, now_ns=50_000_000)
        assert target_at(timeline, 3 * PERIOD_NS) == 3.0

    def test_a_burst_replaces_its_own_newest_and_keeps_what_others_continue(self, timeline: Timeline):
        put(timeline, 0.0, t0_ns=0, now_ns=0, rows=16)
        for k in range(1, 7):
            put(timeline, k / 10, t0_ns=k, now_ns=10)
        assert [chunk_at(timeline, PERIOD_NS + k) for k in range(8)] == [0, 1, 2, 2, 2, 2, 6, 6]

    def test_a_publisher_that_was_held_up_joins_where_the_loop_is(self, timeline: Timeline):
        put(timeline, 0.0, t0_ns=0, now_ns=0, rows=16)
        timeline.progress_ns[0] = 4 * PERIOD_NS + 1
        assert put(timeline, 1.0, t0_ns=0, now_ns=PERIOD_NS) == 6

    def test_a_burst_never_overwrites_the_chunk_in_force(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0, rows=16)
        for _ in range(9):
            put(timeline, 2.0, t0_ns=0, now_ns=50_000_000)
        assert target_at(timeline, 50_000_000) == 1.0
        assert target_at(timeline, 2 * PERIOD_NS) == 2.0


class TestMemory:
    """What was committed at a time whose chunk is overwritten, for who observed then."""

    def remembered_at(self, timeline: Timeline, at_ns: int) -> float:
        out = np.zeros(1)
        remembered_target(timeline, at_ns, out)
        return out[0]

    def test_nothing_is_remembered_of_an_empty_ring(self, timeline: Timeline):
        assert np.isnan(self.remembered_at(timeline, 0))

    def test_nothing_is_remembered_of_the_time_before_the_first_chunk(self, timeline: Timeline):
        for k in range(2):
            put(timeline, 1.0, t0_ns=k, now_ns=150_000_000)
            assert np.isnan(self.remembered_at(timeline, PERIOD_NS))

    def test_it_is_what_is_committed_where_a_chunk_of_the_time_is_left(self, timeline: Timeline):
        for k in range(12):
            put(timeline, np.arange(8.0) - k, t0_ns=k * PERIOD_NS, now_ns=k * PERIOD_NS)
        for at_ns in range(9 * PERIOD_NS, 21 * PERIOD_NS, PERIOD_NS // 3):
            assert self.remembered_at(timeline, at_ns) == pytest.approx(target_at(timeline, at_ns), nan_ok=True)

    @pytest.mark.parametrize("apart_ms", [20, 33, 50, 100])
    def test_frames_older_than_the_ring_still_know_what_ran_then(self, apart_ms: int):
        """Chunks come so fast that of those in the ring none had begun when the newest frame was taken."""
        timeline, ran, forgotten = new_timeline(rows=16, joints=1), dict[int, float](), 0
        for k in range(120):
            now_ns = k * apart_ms * 1_000_000
            t0_ns = now_ns - 450_000_000
            for at_ns in (t0_ns - PERIOD_NS, t0_ns, t0_ns + PERIOD_NS) if k > 60 else ():
                forgotten += bool(np.isnan(target_at(timeline, at_ns)))
                assert self.remembered_at(timeline, at_ns) == pytest.approx(ran[at_ns], abs=0.005)
            put(timeline, np.sin(t0_ns / 1e9 + np.arange(16) / 10), t0_ns=t0_ns, now_ns=now_ns)
            for at_ns in range(now_ns, now_ns + apart_ms * 1_000_000, 1_000_000):
                ran[at_ns] = target_at(timeline, at_ns)
        assert (forgotten > 0) == (apart_ms < 50)

    def test_nothing_is_remembered_once_chunks_are_withdrawn(self, timeline: Timeline):
        for k in range(4):
            put(timeline, 1.0, t0_ns=k, now_ns=k)
        assert self.remembered_at(timeline, PERIOD_NS) == 1.0
        close(timeline)
        assert np.isnan(self.remembered_at(timeline, PERIOD_NS))

    def test_a_slot_that_is_being_written_remembers_nothing(self, timeline: Timeline):
        for k in range(4):
            put(timeline, float(k), t0_ns=k, now_ns=k, rows=16)
        timeline.seam_ns[:] = 6 * PERIOD_NS
        assert self.remembered_at(timeline, 3 * PERIOD_NS) == 0.0
        timeline.sequence[0] += 1
        assert self.remembered_at(timeline, 3 * PERIOD_NS) == 1.0, "the oldest that is whole"
        timeline.sequence[1:] += 1
        assert np.isnan(self.remembered_at(timeline, 3 * PERIOD_NS))


@settings(max_examples=200, deadline=None)
@example(seed=0, latencies=[1, 5, 1, 1, 92, 7])  # more chunks within a period than there are slots
@given(seed=st.integers(0, 2**32 - 1), latencies=st.lists(st.integers(1, 600), min_size=2, max_size=8))
def test_a_target_never_jumps_while_chunks_follow_each_other(seed: int, latencies: list[int]):
    """Row-to-row steps are at most 2 here, so over 1 ms a continuous path moves at most 2 / 100.

    Up to 600 ms the chunk before always has rows left: where it has none, the new one starts with a step.
    """
    rng, timeline, now_ns = np.random.default_rng(seed), new_timeline(rows=16, joints=1, slots=4), 0
    path: list[float] = []
    for latency_ms in latencies:
        t0_ns, end_ns = now_ns, now_ns + latency_ms * 1_000_000
        path += [target_at(timeline, at) for at in range(now_ns, end_ns, 1_000_000)]
        now_ns = end_ns
        put(timeline, rng.uniform(-1, 1, 16), t0_ns=t0_ns, now_ns=now_ns)
    steps = np.abs(np.diff(path))
    assert np.nanmax(steps, initial=0.0) <= 2 / 100 + 1e-12


@pytest.mark.parametrize("slot", [1, 2, 3], ids=["seam to come", "being written", "empty"])
def test_a_slot_that_was_rewritten_after_it_was_found_is_not_used(
    timeline: Timeline, slot: int, monkeypatch: pytest.MonkeyPatch
):
    """As if the writer had come between the search and the look, which only plain Python can be made to show."""
    look = getattr(committed_target_of, "py_func", committed_target_of)
    for k in range(3):
        put(timeline, float(k), t0_ns=k, now_ns=k)
    assert look(timeline, 3, 3 * PERIOD_NS, np.zeros(1))[0] == 2
    timeline.sequence[2] += 1
    monkeypatch.setitem(look.__globals__, "_find_slot_of", lambda *_: slot)
    at_ns = timeline.seam_ns[1] - 1 if slot == 1 else 3 * PERIOD_NS
    assert look(timeline, 3, at_ns, np.zeros(1)) == (EMPTY, NEVER, EMPTY, 0.0)


class TestThreads:
    """A reader without the interpreter's lock beside a writer: what it gets is one whole chunk, the right one."""

    def test_a_lookup_never_sees_half_a_chunk(self):
        timeline, stop = new_timeline(rows=16, joints=6), np.zeros(1, np.int64)
        seen = np.zeros(4, np.int64)
        write_chunks(timeline, 0, 1)
        read_until(timeline, np.ones(1, np.int64), seen)  # compiled before they meet
        reader = threading.Thread(target=read_until, args=(timeline, stop, seen))
        reader.start()
        batches, ends_s = 0, time.monotonic() + 3.0
        while seen[3] < 100_000 and time.monotonic() < ends_s:
            batches += 1
            write_chunks(timeline, batches * 2000, 2000)
        stop[0] = 1
        reader.join()
        lookups, torn, backwards, chunks = seen.tolist()
        assert (torn, backwards) == (0, 0)
        assert chunks >= 50, f"{lookups} lookups beside {batches} batches: they hardly met"

    def test_a_slot_that_is_being_written_is_passed_over(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0)
        put(timeline, 2.0, t0_ns=0, now_ns=0)
        newest = find_slot(timeline, 3 * PERIOD_NS)
        timeline.sequence[newest] += 1
        assert target_at(timeline, 3 * PERIOD_NS) == 1.0
        timeline.sequence[newest] += 1
        assert target_at(timeline, 3 * PERIOD_NS) == 2.0

    def test_a_reader_does_not_wait_for_a_writer_it_may_have_interrupted(self, timeline: Timeline):
        put(timeline, 1.0, t0_ns=0, now_ns=0)
        timeline.sequence[:] |= 1
        assert np.isnan(target_at(timeline, 0))


@njit(nogil=True)
def write_chunks(timeline, first, count):
    """Chunk k holds k in every row and joint; its observation is of time k, and its rows are a nanosecond apart."""
    targets = np.empty((16, 6))
    for k in range(first, first + count):
        targets[:] = k
        commit_chunk(timeline, targets, k, 1, k, 0, 0)


@njit(nogil=True)
def read_until(timeline, stop, seen):
    """Count lookups, lookups of more than one chunk's values, chunks older than one seen before, different chunks."""
    out, last = np.zeros(6), -1
    while load_acquire(stop, 0) == 0:
        now_ns = timeline.newest_t0_ns[0] + 8
        chunk_id = committed_target(timeline, now_ns, out)[0]
        seen[0] += 1
        if chunk_id == EMPTY:
            continue
        if out.min() != out.max():
            seen[1] += 1
        seen[2] += chunk_id < last
        seen[3] += chunk_id != last
        last = chunk_id
