import numpy as np
import pytest
from scipy import stats

from onbeat.runtime.measures import Latency, histogram, summarise_ns, text_table, wilson_interval


def test_no_samples_have_no_figures():
    assert summarise_ns([]) == Latency(0, None, None, None, None, None)


def test_one_sample_has_no_percentile_but_the_middle():
    assert summarise_ns([2_500_000]) == Latency(1, 2.5, None, None, None, 2.5)


@pytest.mark.parametrize("n", [2, 20, 21, 100, 101, 1000, 1001])
def test_percentiles_are_those_of_numpy_where_the_samples_tell_them(n):
    samples = np.random.default_rng(n).integers(0, 10**8, n)
    row, expected = summarise_ns(samples), np.percentile(samples / 1e6, [50, 95, 99, 99.9])
    for figure, percentile, least in zip(
        (row.p50_ms, row.p95_ms, row.p99_ms, row.p99_9_ms), expected, (1, 21, 101, 1001), strict=True
    ):
        assert figure == (pytest.approx(percentile) if n >= least else None)
    assert (row.n, row.max_ms) == (n, samples.max() / 1e6)


@pytest.mark.parametrize(("successes", "attempts"), [(0, 1), (1, 1), (0, 50), (40, 50), (50, 50), (7, 13)])
def test_wilson_interval_is_that_of_scipy(successes, attempts):
    expected = stats.binomtest(successes, attempts).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, attempts) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_by_hand():
    # 81 of 263: the worked example of Newcombe 1998, table I.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_nothing_tried_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("samples", [[], [3.0], [3.0, 3.0], [1.0, 2.0, 9.0]])
def test_histogram_keeps_every_sample(samples):
    bins = histogram(samples, 7)
    assert bins.counts.sum() == len(samples)
    assert len(bins.edges) == 8


def test_table_columns_line_up():
    lines = text_table(("stage", "ms"), [("a", "1.00"), ("longer name", "100.00")]).splitlines()
    assert lines == ["stage            ms", "a              1.00", "longer name  100.00"]
