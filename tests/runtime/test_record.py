"""Ticks on their way out of the loop: a full ring, wrap-around, and a thread that drains meanwhile."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from onbeat.drivers.feetech.protocol import NO_REPLY, OK
from onbeat.kernels.atomics import load_acquire
from onbeat.kernels.compiled import compiled
from onbeat.runtime.record import (
    TickLog,
    TickRing,
    TicksLost,
    append_tick,
    check_whole,
    new_tick_ring,
    take_ticks,
    undrained_tick_ring,
)
from onbeat.runtime.tick import JointLimits, TickState, new_tick_state

LIMITS = JointLimits(*(np.full(2, bound) for bound in (-1.0, 1.0, 2.0, 20.0, np.inf)))


@pytest.fixture
def state() -> TickState:
    return new_tick_state(LIMITS, rate_hz=100, rows=2)


def put(ring: TickRing, state: TickState, k: int) -> None:
    state.record["t_ns"], state.command_q[:] = k, k
    append_tick(ring, state, k, k + 1, k + 2, k + 3, k + 4, NO_REPLY if k % 2 else OK)


def test_what_does_not_fit_into_the_ring_is_counted_and_the_oldest_are_kept(state: TickState):
    ring, log = new_tick_ring(2, 4), TickLog()
    for k in range(7):
        put(ring, state, k)
    assert ring.dropped[0] == 3
    assert log.take(ring) == 4
    assert log.records()["due_ns"].tolist() == [0, 1, 2, 3]


def test_a_record_that_lacks_a_tick_is_not_taken_for_whole(state: TickState):
    ring = new_tick_ring(2, 4)
    for k in range(5):
        put(ring, state, k)
    ticks = take_ticks(ring)
    assert check_whole(ticks, 4) is ticks
    with pytest.raises(TicksLost, match="1 of 5 ticks"):
        check_whole(ticks, 5)


def test_an_undrained_ring_holds_a_long_run_and_its_end():
    assert len(undrained_tick_ring(1, rate_hz=1000, seconds=20).due_ns) >= 22_000


def test_an_empty_ring_gives_nothing():
    ring, log = new_tick_ring(2, 4), TickLog()
    assert log.take(ring) == 0
    assert len(log.records()) == 0


def test_every_field_arrives_in_its_place_and_in_order(state: TickState):
    ring, log = new_tick_ring(2, 4), TickLog()
    for k in range(9):
        put(ring, state, k)
        if k % 3 == 2:
            log.take(ring)
    ticks = log.records()
    order = np.arange(9)
    for offset, name in enumerate(("due_ns", "start_ns", "compute_ns", "exchange_ns", "tell_ns")):
        assert (ticks[name] == order + offset).all(), name
    assert (ticks["t_ns"] == order).all()
    assert (ticks["outcome"] == [OK, NO_REPLY] * 4 + [OK]).all()
    assert (ticks["goal_rad"] == order[:, None]).all()


def test_what_the_tick_saw_arrives_with_it(state: TickState):
    ring, log = new_tick_ring(2, 4), TickLog()
    inputs = state.safety.inputs
    inputs.bus_fault[0], inputs.retries[0] = 3, 4
    seen = {
        "position_rad": state.measured_q,
        "velocity_rad_s": state.measured_dq,
        "load": state.measured_load,
        "temperature_c": inputs.temperature_c,
        "servo_status": inputs.servo_status,
    }
    for k, values in enumerate(seen.values()):
        values[:] = [10 + k, 20 + k]
    put(ring, state, 0)
    log.take(ring)
    ticks = log.records()
    assert (ticks["bus_fault"], ticks["retries"]) == (3, 4)
    assert {name: ticks[name][0].tolist() for name in seen} == {n: [10 + k, 20 + k] for k, n in enumerate(seen)}


def test_a_thread_that_drains_meanwhile_gets_every_tick_once(state: TickState):
    ring, log, stop = new_tick_ring(2, 64), TickLog(), np.ones(1, np.int64)
    put_until(ring, state, stop)  # compiled here, not while the other thread drains an empty ring
    stop[0] = 0
    with ThreadPoolExecutor(1) as threads:
        writing, taken = threads.submit(put_until, ring, state, stop), 0
        while taken < 500 * len(ring.rows) and not writing.done():
            taken += log.take(ring)
        stop[0] = 1
        made = writing.result()
    log.take(ring)
    ticks = log.records()
    assert taken <= len(ticks) == made - int(ring.dropped[0])
    assert (np.diff(ticks["due_ns"]) > 0).all()
    assert (ticks["goal_rad"] == ticks["due_ns"][:, None]).all()


@compiled
def put_until(ring, state, stop):
    """Ticks 0, 1, ... with their number in all places; returns how many."""
    k = 0
    while load_acquire(stop, 0) == 0:
        state.command_q[0] = k
        state.command_q[1] = k
        append_tick(ring, state, k, k, k, k, k, OK)
        k += 1
    return k
