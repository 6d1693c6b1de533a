"""The soak's schedule, its judgement of figures, and one minute of it."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from onbeat.runtime.faults import Fault
from onbeat.runtime.soak import (
    ENDINGS,
    SEAM_LANE,
    TIMES,
    WIRE_LANE,
    SoakFailed,
    end_of,
    main,
    memory_figures,
    problems,
    schedule,
    wanted,
)

LANES = (*SEAM_LANE, *WIRE_LANE)


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
        "runs": {"faults": {"goals_on_the_wire": 7, "goals_sent": 7}},
        "memory_mb": {"faults": {"early": 100.0, "late": 101.0}},
    }


@pytest.mark.parametrize(
    ("part", "value", "complaint"),
    [
        ("fired", {"PORT_LOST": TIMES - 1}, "PORT_LOST fired 4 times of 5"),
        ("control_fired", {"PORT_LOST": 1}, "fired in the run without faults"),
        ("violations", {"faults": {"position": 0, "jerk": 1}}, "limits violated"),
        ("runs", {"faults": {"goals_on_the_wire": 7, "goals_sent": 8}}, "7 goals on the wire, 8 sent"),
        ("memory_mb", {"faults": {"early": 100.0, "late": 105.0}}, "memory grew"),
    ],
)
def test_each_figure_that_is_wrong_is_a_problem(part: str, value: dict, complaint: str):
    assert list(problems(good())) == []
    (problem,) = problems({**good(), part: value})
    assert complaint in problem


def test_memory_is_compared_after_the_start():
    assert memory_figures([300.0, 100.0, 100.0, 100.0, 101.0, 101.0]) == {"early": 100.0, "late": 101.0}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_one_minute(tmp_path: Path):
    """What a shared machine does to the times is no defect; a violated limit is, and a fault that nobody sees."""
    main(["--minutes", "1", "--seed", "5", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "soak.json").read_text())
    assert all(not any(counts.values()) for counts in result["violations"].values())
    assert min(result["fired"].values()) >= TIMES
    assert not [problem for problem in result["problems"] if "let go" in problem or "memory" in problem]
