"""Two arrays of records are the same when every bit is; where they are not, the first place and the size are told."""

import math

import numpy as np
import pytest

from onbeat.runtime.replay.compare import compare, largest_difference

DTYPE = np.dtype([("number", np.int64), ("t_ns", np.int64), ("k", np.int64), ("q", np.float64, (2,))])


def records(count: int = 4) -> np.ndarray:
    made = np.zeros(count, DTYPE)
    made["number"], made["t_ns"] = np.arange(count), 10 * np.arange(count)
    return made


def reports(recorded: np.ndarray, replayed: np.ndarray, **floors: float):
    return compare("/x", recorded, replayed, ["k", "q"], t_field="t_ns", floors=floors)


def test_no_records_are_the_same():
    assert reports(records(0), records(0)) == []


def test_one_nan_is_another():
    one, other = records(), records()
    one["q"][2] = other["q"][2] = np.nan
    assert reports(one, other) == []


def test_zero_is_not_minus_zero_for_its_bits_differ():
    one, other = records(), records()
    other["q"][1, 1] = -0.0
    (report,) = reports(one, other)
    assert (report.first.field, report.largest) == ("q[1]", 0.0)


def test_the_first_place_is_told_with_its_values():
    one, other = records(), records()
    other["q"][2, 1], other["q"][3, 0] = 0.5, 0.7
    (report,) = reports(one, other)
    first = report.first
    assert (first.topic, first.number, first.t_ns, first.field) == ("/x", 2, 20, "q[1]")
    assert (first.recorded, first.replayed) == (0.0, 0.5)
    assert (report.differing, report.records, report.largest) == (2, 4, 0.7)


def test_fields_come_in_the_order_of_their_first_difference():
    one, other = records(), records()
    other["k"][3], other["q"][1] = 1, 1.0
    assert [report.field for report in reports(one, other)] == ["q", "k"]


def test_a_real_number_is_told_in_noise_floors_and_a_whole_one_is_not():
    one, other = records(), records()
    other["k"][1], other["q"][1] = 1, 1e-6
    noise = {report.field: report.noise for report in reports(one, other, q=2.5e-7, k=1.0)}
    assert noise == {"k": None, "q": pytest.approx(4.0)}


def test_without_a_floor_there_is_no_unit():
    one, other = records(), records()
    other["q"][1] = 1e-6
    assert reports(one, other)[0].noise is None
    assert reports(one, other, q=0.0)[0].noise is None


def test_a_number_that_became_none_has_no_size():
    one, other = records(), records()
    other["q"][1] = np.nan
    assert math.isnan(reports(one, other)[0].largest)


def test_the_largest_difference_of_nothing_is_none():
    assert largest_difference(np.empty(0), np.empty(0)) == 0.0
