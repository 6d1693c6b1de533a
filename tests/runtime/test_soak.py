"""The soak's schedule, its judgement of figures, and one minute of it."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onbeat.runtime.faults import Fault
from onbeat.runtime.robots import as_json
from onbeat.runtime.soak import Legs, check_long, main, soak_robot, wanted
from onbeat.runtime.soak_report import memory_figures, problems
from onbeat.runtime.soak_runner import SoakFailed, Told, memory_mb
from onbeat.runtime.soak_schedule import (
    ALONE,
    ENDINGS,
    SEAM_LANE,
    TIMES,
    WIRE_LANE,
    Due,
    all_lanes,
    end_of,
    schedule,
)
from onbeat.runtime.soak_session import Leg

LANES = (*SEAM_LANE, *WIRE_LANE, *ALONE)


def test_every_row_of_the_table_is_made_by_something():
    made = {kind.fault for kind in (*LANES, *ENDINGS)} | {Fault.CHUNK_MISSING}  # which an expired chunk makes
    assert made == set(Fault)


@pytest.mark.parametrize("lane", [SEAM_LANE, WIRE_LANE])
@pytest.mark.parametrize("seconds", [1.0, 600.0])
def test_a_schedule_has_every_kind_five_times_and_no_overlap(lane, seconds: float):
    dues = schedule(lane, np.random.default_rng(3), seconds)
    assert set(Counter(due.kind for due in dues).values()) == {TIMES}
    for before, after in itertools.pairwise(dues):
        assert after.at_s >= before.at_s + before.kind.slot_s - 1e-9
    assert end_of(dues) <= max(seconds, 80.0)


def test_what_wants_the_arm_for_itself_gets_it():
    dues = all_lanes(np.random.default_rng(3), 60)
    assert Counter(due.kind for due in dues) == Counter(dict.fromkeys(LANES, TIMES))
    alone = [due for due in dues if due.kind in ALONE]
    assert min(due.at_s for due in alone) >= end_of([due for due in dues if due.kind not in ALONE])
    assert all(due.joint in due.kind.joints for due in dues)


def test_the_seed_makes_the_schedule():
    one, same, other = (schedule(WIRE_LANE, np.random.default_rng(seed), 60) for seed in (1, 1, 2))
    assert one == same != other


def test_names_of_faults():
    assert wanted("all") == frozenset(Fault)
    assert wanted("port_lost, CHUNK_LATE") == {Fault.PORT_LOST, Fault.CHUNK_LATE}
    with pytest.raises(SoakFailed, match="did you mean 'PORT_LOST'"):
        wanted("PORT_LOSS")


def good() -> dict:
    return {
        "fired": {"PORT_LOST": TIMES},
        "control_fired": {"STOP_REQUESTED": 1},
        "violations": {"faults": {"position": 0, "jerk": 0}},
        "runs": {"faults": {"problem": ""}},
        "memory_mb": {"faults": {"early": 100.0, "late": 101.0}},
    }


@pytest.mark.parametrize(
    ("part", "value", "complaint"),
    [
        ("fired", {"PORT_LOST": TIMES - 1}, "PORT_LOST fired 4 times of 5"),
        ("control_fired", {"PORT_LOST": 1}, "fired in the run without faults"),
        ("violations", {"faults": {"position": 0, "jerk": 1}}, "limits violated"),
        ("runs", {"faults": {"problem": "7 goals came of 8 that were sent"}}, "faults: 7 goals came of 8"),
        ("memory_mb", {"faults": {"early": 100.0, "late": 125.0}}, "memory grew"),
    ],
)
def test_each_figure_that_is_wrong_is_a_problem(part: str, value: dict, complaint: str):
    assert list(problems(good())) == []
    (problem,) = problems({**good(), part: value})
    assert complaint in problem


ALLOCATES = "print(flush=True); input(); kept = b'x' * 40_000_000; print(flush=True); input()"


def test_memory_of_a_process_is_what_it_allocated():
    command = [sys.executable, "-c", ALLOCATES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        before_mb = memory_mb(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        assert memory_mb(process.pid) - before_mb == pytest.approx(40_000_000 / 2**20, abs=8)
        process.stdin.write("\n")
    assert memory_mb(2**22 + 1) == 0.0, "there is no such process"


def test_memory_is_compared_after_the_start():
    assert memory_figures([300.0, 100.0, 100.0, 100.0, 101.0, 101.0]) == {"early": 100.0, "late": 101.0}


class Ends:
    """A runner whose legs end by what it is told, one after the other."""

    def __init__(self, *faults: Fault) -> None:
        self.faults = list(faults)
        self.runs = 0

    def run(self, leg: Leg, _: list[Due]) -> Told:
        fault = self.faults[self.runs]
        self.runs += 1
        if fault is Fault.RUNTIME_HUNG:
            return Told(leg, guardian={"event": "guardian", "fault": fault.name})
        return Told(leg, ended={"ended_by": fault.name, "ticks": 9, "error": None, "faults": {}})

    def keep_spare(self) -> None:
        pass


class FakeTwin:
    port, frames = "", {}


def legs_of(runner: Ends, folder: Path) -> Legs:
    return Legs(runner, soak_robot(), FakeTwin(), 0, folder)  # type: ignore[arg-type]


class TestRepeats:
    @pytest.mark.parametrize("machine", [Fault.BUS_DEAD, Fault.RUNTIME_HUNG])
    def test_a_long_leg_that_the_machine_ended_is_run_once_more_and_told(self, machine: Fault, tmp_path: Path):
        runner = Ends(machine, Fault.STOP_REQUESTED)
        legs = legs_of(runner, tmp_path)
        assert legs.run("faults", 60, [], check_long).ended_by == "STOP_REQUESTED"
        assert [told.ended_by for told in legs.repeated] == [machine.name]

    def test_but_not_twice(self, tmp_path: Path):
        runner = Ends(Fault.BUS_DEAD, Fault.BUS_DEAD)
        with pytest.raises(SoakFailed, match="BUS_DEAD after 9 ticks"):
            legs_of(runner, tmp_path).run("faults", 60, [], check_long)
        assert runner.runs == 2

    def test_nor_what_no_machine_does(self, tmp_path: Path):
        runner = Ends(Fault.SERVO_OVERLOAD)
        with pytest.raises(SoakFailed, match="SERVO_OVERLOAD"):
            legs_of(runner, tmp_path).run("faults", 60, [], check_long)

    def test_what_did_not_fire_often_enough_is_made_in_a_leg_of_its_own(self, tmp_path: Path):
        runner = Ends(Fault.STOP_REQUESTED, Fault.STOP_REQUESTED)
        legs = legs_of(runner, tmp_path)
        main = Told(legs._leg("faults", 60, [], "hold"), ended={"faults": {"SERVO_HOT": TIMES, "CHUNK_STALE": 4}})
        kinds = [kind for kind in LANES if kind.fault in (Fault.SERVO_HOT, Fault.CHUNK_STALE)]
        (again, _) = legs.run_again(main, kinds, np.random.default_rng(0))
        assert [act.kind for act in again.leg.acts] == ["stale"] * TIMES
        assert legs.hidden == {"CHUNK_STALE"}
        assert runner.runs == 2, "it never fires here, and nobody tries for ever"

    def test_nothing_is_made_again_that_fired(self, tmp_path: Path):
        legs = legs_of(Ends(), tmp_path)
        main = Told(legs._leg("faults", 60, [], "hold"), ended={"faults": {"SERVO_HOT": TIMES}})
        assert legs.run_again(main, [k for k in LANES if k.fault is Fault.SERVO_HOT], np.random.default_rng(0)) == []

    def test_a_short_leg_that_was_to_end_so_is_not_repeated(self, tmp_path: Path):
        runner = Ends(Fault.BUS_DEAD)
        kind = next(kind for kind in ENDINGS if kind.fault is Fault.BUS_DEAD)
        assert legs_of(runner, tmp_path).run_short(kind, np.random.default_rng(0)).ended_by == "BUS_DEAD"
        assert runner.runs == 1

    def test_the_arm_of_a_soak_keeps_clear_of_table_and_cube(self):
        low_m = as_json(soak_robot().config)["tool_low_m"]
        assert low_m[2] == 0.05


def soaked(folder: Path, seed: int) -> dict[str, Any]:
    """The report of one minute; what must hold on any machine holds in each, whatever else goes wrong."""
    try:
        main(["--minutes", "1", "--seed", str(seed), "--out", str(folder)])
    except SoakFailed as failed:
        return {"problems": [str(failed)]}
    result = json.loads((folder / "soak.json").read_text())
    assert all(not any(counts.values()) for counts in result["violations"].values()), result["violations"]
    return result


def shortcomings(result: dict[str, Any]) -> list[str]:
    """Without what a busy machine does to times."""
    return [problem for problem in result["problems"] if "between goals, p99" not in problem]


@pytest.mark.alone
@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_one_minute(tmp_path: Path):
    """Once more with another seed when the machine was too busy for a result: a defect shows in both."""
    result = soaked(tmp_path / "first", seed=5)
    if shortcomings(result):
        print("\n".join(shortcomings(result)))
        result = soaked(tmp_path / "second", seed=6)
    assert shortcomings(result) == []
    assert min(result["fired"].values()) >= TIMES, result["fired"]
    assert {name: run["goals"] for name, run in result["runs"].items()} == {
        name: run["ticks"] for name, run in result["runs"].items()
    }
