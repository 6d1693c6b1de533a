"""The machine of the fault table: every row through its detector, and what holds whatever happens."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onbeat.drivers.feetech.protocol import FAULT_NAMES, NO_REPLY, OK, PORT_LOST, SERVO_FAULT
from onbeat.drivers.feetech.tables import Status
from onbeat.runtime.faults import ROW, TABLE, Fault, Level
from onbeat.runtime.safety import (
    BEHIND_TIME_S,
    LOAD_TIME_S,
    NO_FAULT,
    Safety,
    SafetySettings,
    new_safety,
    note_exchange,
    note_joints,
    note_late,
    onsets,
    report,
    set_condition,
    watch,
)

PERIOD_S = 0.01
TICK_NS = 10_000_000
JOINTS = 6
IN_THE_TICK = (Fault.WORKSPACE, Fault.COMMAND_REFUSED)  # found after `watch`: test_tick.py
IN_THE_GUARDIAN = (Fault.RUNTIME_DEAD, Fault.RUNTIME_HUNG)  # test_guardian.py


class Bench:
    """A machine and its clock."""

    def __init__(self, settings: SafetySettings | None = None) -> None:
        self.safety: Safety = new_safety(JOINTS, PERIOD_S, settings)
        self.now_ns = 1_000_000_000
        self.load = np.zeros(JOINTS)
        self.is_missing = False
        self.counts = np.zeros(len(FAULT_NAMES), np.int64)
        self.exchange()

    def tick(self, ticks: int = 1) -> Level:
        level = 0
        for _ in range(ticks):
            level = watch(self.safety, self.now_ns, self.is_missing, self.load)
            self.now_ns += TICK_NS
        return Level(level)

    def exchange(self, outcome: int = OK, status: int = 0, warmth_c: float = 32.0, failed: int = 0) -> None:
        self.counts[NO_REPLY] += failed
        states = np.full(JOINTS, status, np.uint8), np.full(JOINTS, warmth_c)
        note_exchange(self.safety, outcome, self.counts, *states)

    def fresh_frame(self) -> None:
        self.safety.inputs.frame_ns[0] = self.now_ns

    def is_there(self, fault: Fault) -> bool:
        return bool(self.safety.status["age"][fault] > 0)


def lose_frames(bench: Bench) -> None:
    bench.safety.inputs.frame_ns[0] = bench.now_ns - 500_000_001


def push(bench: Bench) -> None:
    bench.load[2] = -0.95
    bench.tick(round(LOAD_TIME_S / PERIOD_S) - 1)


def stand_still(bench: Bench) -> None:
    bench.safety.thresholds.max_behind_rad[:] = 0.1
    for _ in range(round(BEHIND_TIME_S / PERIOD_S)):
        note_joints(bench.safety, np.full(JOINTS, 0.101), np.zeros(JOINTS))


def fail_exchanges(bench: Bench) -> None:
    for _ in range(29):
        bench.exchange(NO_REPLY)
        bench.tick()
    bench.exchange(NO_REPLY)


# What each detector must see, so that the very next tick reacts.
CAUSES: dict[Fault, Callable[[Bench], None]] = {
    Fault.CHUNK_MISSING: lambda bench: setattr(bench, "is_missing", True),
    Fault.CAMERA_STALE: lose_frames,
    Fault.BUS_RETRIES: lambda bench: bench.exchange(failed=11),
    Fault.BUS_SILENT: lambda bench: bench.exchange(NO_REPLY),
    Fault.BUS_DEAD: fail_exchanges,
    Fault.PORT_LOST: lambda bench: bench.exchange(PORT_LOST),
    Fault.SERVO_LOAD: push,
    Fault.SERVO_BEHIND: stand_still,
    Fault.SERVO_HOT: lambda bench: bench.exchange(warmth_c=60.5),
    Fault.SERVO_OVERLOAD: lambda bench: bench.exchange(SERVO_FAULT, Status.CURRENT),
    Fault.SERVO_OVERHEAT: lambda bench: bench.exchange(SERVO_FAULT, Status.TEMPERATURE),
    Fault.SERVO_POWER: lambda bench: bench.exchange(SERVO_FAULT, Status.VOLTAGE),
    Fault.SERVO_SENSOR: lambda bench: bench.exchange(SERVO_FAULT, Status.SENSOR),
}
ROWS = [row for row in TABLE if row.fault not in (*IN_THE_TICK, *IN_THE_GUARDIAN)]


def cause(bench: Bench, fault: Fault) -> None:
    CAUSES.get(fault, lambda b: set_condition(b.safety, fault, True))(bench)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fault.name)
class TestEveryRow:
    def test_reacts_within_the_ticks_it_says(self, row):
        bench = Bench()
        bench.tick(3)
        assert not bench.is_there(row.fault)
        cause(bench, row.fault)
        level = bench.tick(max(1, row.within_ticks))
        assert bench.is_there(row.fault)
        assert onsets(bench.safety)[row.fault.name] == 1
        assert level >= row.reaction

    def test_gets_worse_when_it_lasts_and_not_before(self, row):
        bench = Bench()
        set_condition(bench.safety, row.fault, True)
        stays = round(row.then_after_s / PERIOD_S)
        keep = bench.safety.inputs.conditions

        def level(ticks: int) -> int:
            for _ in range(ticks):
                cause(bench, row.fault) if row.fault in CAUSES else keep.__setitem__(row.fault, 1)
                bench.tick()
            return int(bench.safety.status["level"][row.fault])

        if row.then is None:
            assert level(300) == row.reaction
            return
        assert level(stays) == row.reaction or row.fault in CAUSES
        assert level(2) == row.then

    def test_ends_the_run_or_clears_by_itself(self, row):
        bench = Bench()
        if row.fault in CAUSES:
            pytest.skip("cleared by its own detector: the tests below")
        set_condition(bench.safety, row.fault, True)
        bench.tick(2)
        set_condition(bench.safety, row.fault, False)
        kept = round(row.clears_after_s / PERIOD_S)
        bench.tick(kept)
        assert bench.is_there(row.fault)
        bench.tick(2)
        assert bench.is_there(row.fault) == row.ends_run
        assert bench.safety.ended_by[0] == (row.fault if row.ends_run else NO_FAULT)


class TestDetectors:
    def test_a_frame_of_exactly_the_age_is_not_stale(self):
        bench = Bench(SafetySettings(max_frame_age_ms=200))
        bench.safety.inputs.frame_ns[0] = bench.now_ns - 200_000_000
        assert bench.tick() == Level.OK
        assert bench.tick() == Level.SLOW

    def test_no_camera_is_no_stale_camera(self):
        assert Bench().tick(1000) == Level.OK

    def test_frames_that_come_again_clear_it_after_a_while(self):
        bench = Bench()
        lose_frames(bench)
        assert bench.tick(60) == Level.HOLD
        for _ in range(round(ROW[Fault.CAMERA_STALE].clears_after_s / PERIOD_S)):
            bench.fresh_frame()
            assert bench.tick() == Level.HOLD
        bench.fresh_frame()
        assert bench.tick() == Level.OK

    def test_a_short_push_is_no_fault(self):
        bench = Bench()
        bench.load[0] = 1.0
        bench.tick(round(LOAD_TIME_S / PERIOD_S) - 1)
        bench.load[0] = 0.74
        assert bench.tick(200) == Level.OK
        assert onsets(bench.safety)["SERVO_LOAD"] == 0

    @pytest.mark.parametrize(("high", "low", "is_fault"), [(1, 1, False), (2, 3, False), (3, 1, True)])
    def test_a_push_counts_when_it_is_there_more_often_than_not(self, high: int, low: int, is_fault: bool):
        bench = Bench()
        for _ in range(100):
            for load, ticks in ((1.0, high), (0.0, low)):
                bench.load[0] = load
                bench.tick(ticks)
        assert bench.is_there(Fault.SERVO_LOAD) is is_fault

    def test_a_push_is_over_when_the_joint_was_free_for_as_long(self):
        bench = Bench()
        push(bench)
        bench.tick(30)
        bench.load[2] = 0.0
        assert bench.tick(round(LOAD_TIME_S / PERIOD_S) - 1) == Level.SLOW
        bench.tick(round(ROW[Fault.SERVO_LOAD].clears_after_s / PERIOD_S) + 1)
        assert bench.tick() == Level.OK

    def test_as_far_behind_as_is_allowed_is_no_fault(self):
        bench = Bench(SafetySettings(max_behind_rad=(0.1,) * JOINTS))
        for sign in (1, -1):
            for _ in range(100):
                note_joints(bench.safety, np.full(JOINTS, sign * 0.1), np.zeros(JOINTS))
                assert bench.tick() == Level.OK

    def test_ahead_and_back_is_as_far_behind_as_any(self):
        bench = Bench(SafetySettings(max_behind_rad=(0.1,) * JOINTS))
        for k in range(round(BEHIND_TIME_S / PERIOD_S)):
            note_joints(bench.safety, np.zeros(JOINTS), np.full(JOINTS, 0.2 * (-1) ** k))
        assert bench.tick() == Level.SLOW

    def test_a_retry_now_and_then_is_within_the_budget(self):
        bench = Bench()
        for _ in range(100):
            bench.exchange(failed=1)
            assert bench.tick(21) == Level.OK  # under five a second

    def test_a_loose_cable_is_not(self):
        bench = Bench()
        for _ in range(40):
            bench.exchange(failed=1)
            bench.tick(4)
        assert bench.is_there(Fault.BUS_RETRIES)

    def test_one_lost_exchange_slows_two_ticks_more_hold_and_a_good_one_forgives(self):
        bench = Bench()
        bench.exchange(NO_REPLY)
        assert [bench.tick() for _ in range(3)] == [Level.SLOW, Level.SLOW, Level.HOLD]
        bench.exchange(OK)
        bench.tick(12)
        assert bench.tick() == Level.OK
        assert bench.safety.ended_by[0] == NO_FAULT

    @pytest.mark.parametrize(("lost", "good", "worst"), [(1, 5, Level.SLOW), (1, 1, Level.SLOW), (2, 1, Level.HOLD)])
    def test_exchanges_lost_now_and_then_hold_only_where_most_are(self, lost: int, good: int, worst: Level):
        bench, levels = Bench(SafetySettings(retry_burst=np.inf)), set()
        for _ in range(50):
            for outcome in (NO_REPLY,) * lost + (OK,) * good:
                bench.exchange(outcome)
                levels.add(bench.tick())
        assert max(levels) == worst
        assert onsets(bench.safety)["BUS_SILENT"] == 1

    def test_a_hold_is_kept_until_the_fault_has_cleared(self):
        bench = Bench()
        for _ in range(5):
            bench.exchange(NO_REPLY)
            bench.tick()
        bench.exchange(OK)
        cleared = round(ROW[Fault.BUS_SILENT].clears_after_s / PERIOD_S)
        assert [bench.tick() for _ in range(cleared)] == [Level.HOLD] * cleared
        assert bench.tick() == Level.OK

    def test_what_ends_a_run_gets_worse_though_it_was_seen_once(self):
        bench = Bench()
        bench.exchange(SERVO_FAULT, Status.TEMPERATURE)
        bench.tick()
        bench.exchange(OK)
        assert bench.tick(round(ROW[Fault.SERVO_OVERHEAT].then_after_s / PERIOD_S) - 1) == Level.HOLD
        assert bench.tick() == Level.LIMP

    def test_a_lost_exchange_says_nothing_of_the_servos(self):
        bench = Bench()
        bench.exchange(NO_REPLY, status=Status.OVERLOAD, warmth_c=90.0)
        bench.tick()
        assert not bench.is_there(Fault.SERVO_OVERLOAD)
        assert not bench.is_there(Fault.SERVO_HOT)

    def test_the_first_fault_that_ends_a_run_is_its_reason(self):
        bench = Bench()
        report(bench.safety, Fault.INFERENCE_DIED)
        bench.tick()
        set_condition(bench.safety, Fault.STOP_REQUESTED, True)
        bench.tick()
        assert bench.safety.ended_by[0] == Fault.INFERENCE_DIED

    def test_an_event_is_there_for_its_tick_alone(self):
        bench = Bench()
        report(bench.safety, Fault.CHUNK_LATE)
        assert bench.tick() == Level.WARN
        assert bench.tick() == Level.OK
        report(bench.safety, Fault.CHUNK_LATE, 3)
        bench.tick()
        assert onsets(bench.safety)["CHUNK_LATE"] == 2
        assert bench.safety.inputs.events[Fault.CHUNK_LATE] == 4

    def test_what_the_tick_finds_itself_counts_in_the_same_tick(self):
        bench = Bench()
        bench.tick()
        note_late(bench.safety, Fault.COMMAND_REFUSED, True)
        assert bench.safety.level[0] == Level.HOLD
        assert bench.tick() == Level.HOLD

    def test_the_workspace_does_not_withhold_the_target_that_leads_back(self):
        bench = Bench()
        bench.tick()
        note_late(bench.safety, Fault.WORKSPACE, True)
        assert bench.safety.level[0] == Level.HOLD
        assert bench.tick() == Level.OK


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(Fault)), st.booleans(), st.integers(1, 40)), max_size=12))
def test_no_history_leaves_a_present_fault_unanswered(history):
    """The level is never below the reaction of any fault that is there; what ends a run never clears."""
    bench, ended = Bench(), NO_FAULT
    for fault, is_event, ticks in history:
        if is_event:
            report(bench.safety, fault)
        else:
            set_condition(bench.safety, fault, not bench.safety.inputs.conditions[fault])
        for _ in range(ticks):
            level = bench.tick()
            there = [row for row in ROWS if bench.is_there(row.fault)]
            assert level >= max((row.reaction for row in there), default=Level.OK)
            assert ended in (NO_FAULT, bench.safety.ended_by[0])
            ended = int(bench.safety.ended_by[0])
            assert ended == NO_FAULT or bench.is_there(Fault(ended))
