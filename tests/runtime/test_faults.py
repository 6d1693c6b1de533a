"""The table itself: whole, in order, printable, and the same in the documents as in the program."""

from pathlib import Path

import pytest

from onbeat.runtime.faults import ROW, TABLE, Fault, Level, as_markdown, clearing_text, fault_names, reaction_text

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "faults.md"


def test_every_fault_has_one_row_in_the_order_of_its_number():
    assert [row.fault for row in TABLE] == list(Fault)
    assert [int(fault) for fault in Fault] == list(range(len(Fault)))
    assert len(Fault) <= 63, "one bit each in an int64"


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.fault.name)
def test_a_row_says_something_and_does_not_get_milder(row):
    assert row.reaction > Level.OK
    assert row.cause
    assert row.detector
    assert row.policy
    assert 0 <= row.within_ticks <= 40
    assert row.then is None or row.then > row.reaction
    assert (row.then is None) == (row.then_after_s == 0.0)
    assert not (row.ends_run and row.clears_after_s)


def test_what_ends_a_run_brings_the_arm_to_rest_first():
    assert all(row.reaction >= Level.HOLD for row in TABLE if row.ends_run)


def test_the_document_shows_this_table():
    assert as_markdown() in DOCUMENT.read_text(encoding="utf-8"), "run `python -m onbeat.runtime.faults --write`"


def test_texts_of_a_row():
    assert reaction_text(ROW[Fault.CAMERA_STALE]) == "slow, hold after 0.5 s"
    assert reaction_text(ROW[Fault.CHUNK_LATE]) == "warn"
    assert clearing_text(ROW[Fault.PORT_LOST]) == "ends the run"
    assert clearing_text(ROW[Fault.CAMERA_STALE]) == "by itself after 0.2 s"


def test_bits_have_names():
    assert fault_names(1 << Fault.PORT_LOST | 1) == ["CHUNK_LATE", "PORT_LOST"]
    assert fault_names(0) == []
