"""What a soak says of the reactions: an arm that obeys passes, and each way of not obeying is seen."""

import numpy as np
import pytest

import onbeat.runtime.soak_reactions as soak_reactions
from onbeat.drivers.feetech.packets import RAD_PER_STEP
from onbeat.drivers.twin.judge import WireLimits
from onbeat.runtime.faults import ROW, TABLE, Fault, Level
from onbeat.runtime.soak_reactions import FOUND_S, Bounds, Reaction, made_of, reactions, spans_of, windows_of
from onbeat.runtime.soak_runner import Told
from onbeat.runtime.soak_schedule import IN_TURN, SILENCES, Due
from onbeat.runtime.soak_session import Leg

DT, TICKS, JOINTS = 0.005, 1200, 6
TICK = np.dtype([("seen", np.int64), ("due_ns", np.int64), ("load", np.float64, (JOINTS,))])
LIMITS = WireLimits(*(np.full(JOINTS, bound) for bound in (-1.5, 1.5, 3.0, 20.0, 1000.0)), period_s=DT)
BOUNDS = Bounds(LIMITS, 0.25 * LIMITS.v_max)
START_NS = 10**9


def ticks_with(fault: Fault, *seen: range) -> np.ndarray:
    """Ticks whose detectors see a fault in these ranges."""
    ticks = np.zeros(TICKS, TICK)
    ticks["due_ns"] = START_NS + np.arange(TICKS) * 5_000_000
    for part in seen:
        ticks["seen"][list(part)] |= 1 << int(fault)
    return ticks


def goals_that(levels: np.ndarray, slow_rad_s: float = 0.75, sway_rad_s: float = 2.0) -> np.ndarray:
    """Goals (T, J) in steps of an arm that sways and does in each tick what its level says, as fast as it brakes."""
    most = np.where(levels >= Level.HOLD, 0.0, np.where(levels == Level.SLOW, slow_rad_s, np.inf))
    v, speeds = 0.0, []
    for k, bound in enumerate(most):
        wanted = sway_rad_s * np.sin(1.5 * k * DT + 0.5)
        v += np.clip(np.clip(wanted, -bound, bound) - v, -20.0 * DT, 20.0 * DT)
        speeds.append(v)
    way = np.rint(np.cumsum(speeds) * DT / RAD_PER_STEP).astype(np.int64)
    return np.repeat(way[:, None], JOINTS, axis=1)


def levels_of(ticks: np.ndarray) -> np.ndarray:
    """What the table wants in each tick."""
    levels = np.zeros(TICKS, np.int64)
    for window in windows_of(ticks, DT):
        levels[window.begin : window.end] = np.maximum(levels[window.begin : window.end], window.level)
    return levels


def judged(ticks: np.ndarray, levels: np.ndarray, fault: Fault, level: Level, **arm: float) -> Reaction:
    without = goals_that(np.zeros(TICKS, np.int64))
    return reactions([(ticks, goals_that(levels, **arm))], without, BOUNDS)[fault, level]


@pytest.mark.parametrize("fault", [row.fault for row in TABLE if Level.HOLD in (row.reaction, row.then)])
def test_an_arm_that_obeys_passes_and_one_that_only_warns_is_caught(fault: Fault):
    long = round((ROW[fault].then_after_s + 0.5) / DT)
    ticks = ticks_with(fault, range(200, 200 + long))
    found = judged(ticks, levels_of(ticks), fault, Level.HOLD)
    assert (found.judged, found.broken, found.without) == (1, 0, 1)
    assert judged(ticks, np.zeros(TICKS, np.int64), fault, Level.HOLD).broken == 1
    assert judged(ticks, np.minimum(levels_of(ticks), Level.SLOW), fault, Level.HOLD).broken == 1


@pytest.mark.parametrize("fault", [row.fault for row in TABLE if row.reaction == Level.SLOW])
def test_slow_is_slow_from_the_first_reaction_on(fault: Fault):
    ticks = ticks_with(fault, range(200, 260))
    found = judged(ticks, levels_of(ticks), fault, Level.SLOW)
    assert (found.judged, found.broken, found.without) == (1, 0, 1)
    assert judged(ticks, np.zeros(TICKS, np.int64), fault, Level.SLOW).broken == 1


def test_a_tenth_too_fast_is_not_slow():
    ticks = ticks_with(Fault.SERVO_HOT, range(200, 400))
    assert judged(ticks, levels_of(ticks), Fault.SERVO_HOT, Level.SLOW, slow_rad_s=0.82).broken == 1


def test_a_hold_that_ends_too_early_is_caught():
    """SERVO_POWER holds for half a second after it was last seen."""
    ticks = ticks_with(Fault.SERVO_POWER, range(200, 220))
    levels = levels_of(ticks)
    assert np.flatnonzero(levels == Level.HOLD).tolist() == list(range(200, 320))
    levels[290:] = Level.OK
    assert judged(ticks, levels, Fault.SERVO_POWER, Level.HOLD).broken == 1


def test_an_arm_that_is_too_late_is_caught():
    ticks = ticks_with(Fault.SERVO_POWER, range(200, 220))
    levels = levels_of(ticks)
    levels[200:240] = Level.OK
    assert judged(ticks, levels, Fault.SERVO_POWER, Level.HOLD).broken == 1


def test_what_comes_and_goes_is_not_asked_to_get_worse():
    parts = [range(k, k + 10) for k in range(200, 600, 40)]
    ticks = ticks_with(Fault.CAMERA_STALE, *parts)
    assert [w.level for w in windows_of(ticks, DT)] == [Level.SLOW]
    assert judged(ticks, levels_of(ticks), Fault.CAMERA_STALE, Level.SLOW).broken == 0


def test_a_joint_that_pushes_gives_way_and_the_others_do_not():
    ticks = ticks_with(Fault.SERVO_POWER, range(200, 220))
    ticks["load"][200:320, 2] = 1.0
    goals = goals_that(levels_of(ticks))
    goals[270:, 2] += 40
    without = goals_that(np.zeros(TICKS, np.int64))
    assert reactions([(ticks, goals)], without, BOUNDS)[Fault.SERVO_POWER, Level.HOLD].broken == 0
    goals[270:, 3] += 40
    assert reactions([(ticks, goals)], without, BOUNDS)[Fault.SERVO_POWER, Level.HOLD].broken == 1


def test_a_reaction_that_is_over_before_the_arm_could_brake_is_not_judged():
    ticks = ticks_with(Fault.COMMAND_REFUSED, range(200, 201))
    assert judged(ticks, np.zeros(TICKS, np.int64), Fault.COMMAND_REFUSED, Level.HOLD) == Reaction(too_short=1)


def test_an_arm_that_rests_anyway_shows_nothing():
    ticks = ticks_with(Fault.SERVO_POWER, range(200, 220))
    rest = np.zeros((TICKS, JOINTS), np.int64)
    assert reactions([(ticks, rest)], rest, BOUNDS)[Fault.SERVO_POWER, Level.HOLD] == Reaction(judged=1, alone=1)


def test_a_window_in_which_another_row_asks_for_as_much_says_less():
    ticks = ticks_with(Fault.SERVO_HOT, range(200, 220))
    assert judged(ticks, levels_of(ticks), Fault.SERVO_HOT, Level.SLOW).alone == 1
    ticks["seen"] |= ticks_with(Fault.SERVO_POWER, range(250, 260))["seen"]
    found = judged(ticks, levels_of(ticks), Fault.SERVO_HOT, Level.SLOW)
    assert (found.judged, found.alone, found.broken) == (1, 0, 0)
    assert judged(ticks, levels_of(ticks), Fault.SERVO_POWER, Level.HOLD).alone == 1


def test_spans_end_when_a_fault_was_not_seen_for_long_enough():
    row = ROW[Fault.CAMERA_BLANK]  # 0.2 s, 40 ticks
    spans = spans_of(ticks_with(row.fault, range(100, 110), range(150, 151), range(192, 193)), row, DT)
    assert spans == [(100, 150, 191), (192, 192, 233)]
    assert spans_of(ticks_with(row.fault), row, DT) == []
    assert spans_of(ticks_with(Fault.DISK_FULL, range(9, 12)), ROW[Fault.DISK_FULL], DT) == [(9, 11, TICKS)]


def told(dues: list[Due]) -> Told:
    return Told(Leg("faults", {}, 6.0, 0, ""), dues, ended={"log": "log"}, moving_ns=START_NS)


def test_a_fault_counts_for_its_injection_only_in_its_own_time(monkeypatch: pytest.MonkeyPatch):
    silence = next(kind for kind in SILENCES if kind.kind == "silence")
    monkeypatch.setattr(soak_reactions, "read_ticks", lambda _: ticks_with(silence.fault, range(202, 212)))
    times = made_of([told([Due(silence, at_s, 0) for at_s in (1.0, 1.5, 3.0)])], DT)[silence]
    assert times == [pytest.approx(0.01), None, None]


def test_what_was_there_before_is_not_what_was_made(monkeypatch: pytest.MonkeyPatch):
    silence = next(kind for kind in SILENCES if kind.kind == "silence")
    monkeypatch.setattr(soak_reactions, "read_ticks", lambda _: ticks_with(silence.fault, range(190, 260)))
    assert made_of([told([Due(silence, 1.0, 0)])], DT) == {silence: [None]}


def test_every_fault_with_a_time_of_its_own_is_made_for_longer_than_that_or_once():
    for kind in (kind for group in IN_TURN for kind in group):
        if kind.lasts_s and kind.fault in FOUND_S:
            assert kind.lasts_s > FOUND_S[kind.fault]
