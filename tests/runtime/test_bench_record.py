"""What recording costs is judged against what the loop differs from itself; and what is measured is a real recorder."""

import threading
from dataclasses import asdict

import numpy as np
import pytest

from onbeat.drivers.feetech.fake import FakeBus
from onbeat.runtime.bench_record import (
    AGAIN,
    OFF,
    RECORDER,
    VIEW,
    WAYS,
    Recording,
    Samples,
    costs_as_text,
    judge_costs,
    run_slice,
)
from onbeat.runtime.engine import PolicySpec, SamplerSpec
from onbeat.runtime.flight.reader import read_log
from onbeat.runtime.loop import ControlLoop, LoopFault, compile_ahead
from onbeat.runtime.mailbox import StateHistory
from onbeat.runtime.profile.spread import SAME, SLOWER
from onbeat.runtime.record import TicksLost, new_tick_ring
from onbeat.runtime.robots import load_robot
from onbeat.runtime.tick import new_tick_state

pytestmark = pytest.mark.alone

SPEC = PolicySpec(2, 8, 1, 4, 1, 0, SamplerSpec(1, 1, "off", gate_lambda=0.0, gate_temperature=1.0, gate_directions=0))


def lateness(extra_us: float, seed: int) -> Samples:
    late_us = np.random.default_rng(seed).normal(100, 10, 8000) + extra_us
    return Samples([(late_us * 1000).astype(np.int64)], missed=0, faulty=0)


def test_what_is_within_the_spread_is_no_difference_and_what_is_beyond_is_named():
    found = {OFF: lateness(0, 1), AGAIN: lateness(0, 2), RECORDER: lateness(0, 3), VIEW: lateness(60, 4)}
    costs = judge_costs(found)
    assert {j.verdict for j in costs[RECORDER]} == {SAME}
    assert {j.verdict for j in costs[VIEW]} == {SLOWER}
    text = costs_as_text({200: costs})
    assert "A/A spread" in text
    assert text.count(SLOWER) == 3


def test_a_loop_that_differs_from_itself_excuses_as_much():
    found = {OFF: lateness(0, 1), AGAIN: lateness(80, 2), RECORDER: lateness(60, 3), VIEW: lateness(60, 4)}
    assert {j.verdict for way in judge_costs(found).values() for j in way} == {SAME}


def test_a_slice_that_fails_leaves_no_thread_behind(tmp_path):
    robot = load_robot("so101-twin")
    before = threading.active_count()
    with (
        pytest.raises(LoopFault),
        Recording(robot, SPEC, tmp_path, is_viewed=False).of(new_tick_ring(len(robot.joints), 1)),
    ):
        raise LoopFault("the servos fell silent")
    assert threading.active_count() == before


def test_a_slice_that_lost_ticks_is_an_error(tmp_path):
    robot = load_robot("so101-twin")
    compile_ahead(robot.limits)
    bus, state = FakeBus(robot.joints), new_tick_state(robot.limits, rate_hz=1000, rows=4)
    bus.enable(True)
    state.measured_q[:] = 0.0
    joints = len(robot.joints)
    loop = ControlLoop(state, bus, history=StateHistory(joints), records=new_tick_ring(joints, 4))
    threading.Timer(0.05, loop.stop).start()
    with pytest.raises(TicksLost):
        run_slice(OFF, loop, loop.run, Recording(robot, SPEC, tmp_path, is_viewed=False))


@pytest.mark.slow
def test_a_slice_with_a_recorder_leaves_a_log_with_ticks_and_inferences(tmp_path):
    robot = load_robot("so101-twin")
    compile_ahead(robot.limits)
    bus = FakeBus(robot.joints)
    bus.enable(True)
    samples = Samples()
    for way in (OFF, RECORDER):
        state = new_tick_state(robot.limits, rate_hz=200, rows=4)
        state.measured_q[:] = 0.0
        loop = ControlLoop(state, bus, history=StateHistory(len(robot.joints)))
        threading.Timer(0.7, loop.stop).start()
        ticks = run_slice(way, loop, loop.run, Recording(robot, SPEC, tmp_path, is_viewed=False))
        assert len(ticks) == loop.status.ticks
        samples.add(ticks, loop)
    log = read_log(tmp_path)
    assert log.problems == ()
    assert len(log.records("/chunk")) >= 2
    assert len(log.records("/machine")) >= 1
    assert len(samples.all_ns) > 100
    assert samples.missed >= 0


def test_every_way_is_measured_by_name():
    assert set(WAYS) == {OFF, AGAIN, RECORDER, VIEW}
    (first, *_) = judge_costs({way: lateness(0, k) for k, way in enumerate(WAYS)})[RECORDER]
    assert asdict(first)["percent"] == 50.0
