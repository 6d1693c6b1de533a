"""Charts: round figures on the axes, data where it belongs, and no spike lost in thinning."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onbeat.runtime import chart
from onbeat.runtime.chart import BOTTOM, LEFT, RIGHT, TOP, Axes

AXES = Axes(400, 200, (0.0, 10.0), (-1.0, 1.0))


def test_corners_of_the_data_are_corners_of_the_frame():
    assert (AXES.x(0.0), AXES.x(10.0)) == (LEFT, 400 - RIGHT)
    assert (AXES.y(1.0), AXES.y(-1.0)) == (TOP, 200 - BOTTOM)


def test_axes_without_extent_divide_by_nothing():
    flat = Axes(400, 200, (3.0, 3.0), (0.0, 0.0))
    assert np.isfinite([flat.x(3.0), flat.y(0.0)]).all()
    assert chart.labelled_ticks(flat.x_range, 5) == [(3.0, "3")]


@pytest.mark.parametrize(
    ("limits", "count", "texts"),
    [
        ((0.0, 10.0), 5, ["0", "2", "4", "6", "8", "10"]),
        ((0.0, 0.25), 5, ["0.00", "0.05", "0.10", "0.15", "0.20", "0.25"]),
        ((-95.0, 95.0), 4, ["-50", "0", "50"]),
        ((0.0, 10.0), 0, []),
    ],
)
def test_ticks_are_round_and_inside(limits, count, texts):
    assert [text for _, text in chart.labelled_ticks(limits, count)] == texts


@given(st.floats(1e-6, 1e9))
def test_a_step_is_1_2_or_5_and_not_below_what_was_asked(step):
    rounded = chart.round_step(step)
    assert step * (1 - 1e-6) <= rounded <= step * 2.5 * (1 + 1e-6)
    assert round(rounded / 10 ** np.floor(np.log10(rounded) + 1e-9), 6) in (1.0, 2.0, 5.0)


def test_a_line_breaks_where_there_is_nothing():
    path = chart.line(AXES, [0, 1, 2, 3], [0.0, float("nan"), 0.5, 1.0], "pen")
    assert path.count("M") == 2
    assert path.count("L") == 1
    assert "nan" not in path


def test_blocks_are_cut_to_the_frame_and_left_out_beyond_it():
    assert chart.block(AXES, (11, 12), (0, 1), "ink") == ""
    whole = chart.block(AXES, (-5, 99), (0, 1), "ink")
    assert f'x="{LEFT:.1f}"' in whole
    assert f'width="{400 - LEFT - RIGHT:.1f}"' in whole


def test_bars_leave_out_empty_bins():
    assert chart.bars(AXES, [0, 1, 2, 3], [-1.0, 1.0, 0.0], "ink").count("<rect") == 2


def test_words_of_a_marker_stand_on_the_side_with_room():
    assert 'text-anchor="start"' in chart.marker(AXES, 1, "mark", "p50")
    assert 'text-anchor="end"' in chart.marker(AXES, 9, "mark", "p99")


def test_words_are_escaped():
    for drawn in (chart.svg(AXES, title="<b>"), chart.note(AXES, 0, 0, "<b>"), chart.legend([("ink", "<b>")])):
        assert "&lt;b&gt;" in drawn


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=300), st.integers(1, 50))
def test_thinning_by_peaks_keeps_the_greatest(values, columns):
    ys = np.array(values)
    xs, kept = chart.peaks(np.arange(len(ys), dtype=float), ys, columns)
    assert len(xs) == len(kept) <= max(columns, min(len(ys), columns))
    assert kept.max() == ys.max()


@pytest.mark.parametrize("count", [0, 1, 2, 899, 900, 901, 10_000])
def test_sparse_keeps_first_and_last(count):
    kept = chart.sparse(count, 900)
    assert len(kept) == min(count, 900)
    if count:
        assert (kept[0], kept[-1]) == (0, count - 1)
