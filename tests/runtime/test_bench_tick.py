"""What a tick may cost: the budget adds up, the loop allocates nothing, and its steps are within what they may take."""

import numpy as np
import pytest
from numba.core.runtime import _nrt_python, rtsys

from onbeat.drivers.feetech import pace
from onbeat.drivers.feetech.fake import FakeBus
from onbeat.drivers.feetech.protocol import NO_REPLY, OK
from onbeat.runtime.bench_tick import BUDGET, BUS, MAILBOX, Step, as_text, cost_of, part_costs, record_ticks
from onbeat.runtime.link import mailbox_link
from onbeat.runtime.loop import compile_ahead, new_loop_box, run_loop
from onbeat.runtime.mailbox import PROGRESS_WORDS, TICKS, StateHistory, new_words, put_answer
from onbeat.runtime.record import new_tick_ring
from onbeat.runtime.robots import load_robot
from onbeat.runtime.tick import new_tick_state

pytestmark = pytest.mark.alone

ROBOT = load_robot("so101-twin")
JOINTS = len(ROBOT.joints)
PATIENCE = 20  # times the budget: a test machine's processors are taken


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    compile_ahead(ROBOT.limits)


class TestBudget:
    def test_is_what_the_pace_of_a_bus_sets_aside(self):
        assert (
            sum(step.allowed_us for step in BUDGET if BUS in step.on and step.name != "exchange") * 1000 <= pace.TICK_NS
        )

    def test_leaves_a_kilohertz_to_a_mailbox(self):
        assert sum(step.allowed_us for step in BUDGET if MAILBOX in step.on) < 500.0

    def test_holds_an_exchange_of_the_bus_at_its_rate(self):
        exchange = next(step for step in BUDGET if step.name == "exchange" and BUS in step.on)
        bus = pace.BusPace(JOINTS, ROBOT.config.baud_rate)
        assert bus.wire_ns < exchange.allowed_us * 1000 < 1e9 / ROBOT.config.loop_rate_hz - pace.TICK_NS

    def test_what_is_over_it_is_told(self):
        step = Step("wake", 10.0, "x")
        within, over = (cost_of(step, MAILBOX, np.full(100, ns)) for ns in (10_000, 10_001))
        assert within.is_within
        assert not over.is_within
        with pytest.raises(KeyError):
            as_text([cost_of(Step("nap", 1.0, "x"), MAILBOX, np.ones(3))])


def run_until_silent(rate_hz: float) -> tuple[int, int]:
    """(ticks, allocations of numba's runtime) of a loop whose joints fall silent and end it."""
    state, box = new_tick_state(ROBOT.limits, rate_hz=rate_hz, rows=16), mailbox_link(JOINTS)
    state.measured_q[:] = 0.0
    put_answer(box.box, 0, OK, np.zeros(JOINTS), np.zeros(JOINTS), np.zeros(JOINTS))
    shared = new_loop_box(StateHistory(JOINTS).ring, new_tick_ring(JOINTS), new_words(PROGRESS_WORDS))
    before = rtsys.get_allocation_stats().alloc
    assert run_loop(state, box, shared) == NO_REPLY
    return int(shared.progress[TICKS]), rtsys.get_allocation_stats().alloc - before


def test_the_loop_allocates_nothing_after_its_start():
    """A loop of few ticks and one of many allocate the same: what the call itself takes. The compiler checks it too."""
    was_counting = _nrt_python.memsys_stats_enabled()
    _nrt_python.memsys_enable_stats()
    try:
        few, of_few = run_until_silent(50)
        many, of_many = run_until_silent(1000)
    finally:
        if not was_counting:
            _nrt_python.memsys_disable_stats()
    assert many > 5 * few
    assert of_few == of_many


def test_the_parts_of_a_tick_are_within_many_times_their_budget():
    costs = list(part_costs(ROBOT))
    assert [cost.step for cost in costs] == [step.name for step in BUDGET if not step.on]
    assert all(0 < cost.p50_us < cost.allowed_us * PATIENCE for cost in costs)


def test_real_ticks_are_timed():
    bus = FakeBus(ROBOT.joints)
    bus.enable(True)
    ticks = record_ticks(ROBOT, bus, 200, 0.5)
    assert len(ticks["due_ns"]) > 30
    assert np.median(ticks["compute_ns"]) < 100_000 * PATIENCE
    busy_ns = ticks["start_ns"] - ticks["due_ns"] + ticks["compute_ns"] + ticks["exchange_ns"]
    assert (busy_ns > 0).all()
