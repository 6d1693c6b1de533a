"""Verdicts say "no difference" of runs of the same and find what was planted, on samples that hang together."""

from collections.abc import Sequence

import numpy as np
import pytest

from onbeat.runtime.profile import spread
from onbeat.runtime.profile.spread import (
    FASTER,
    SAME,
    SLOWER,
    UNKNOWN,
    Judgement,
    cut,
    difference_interval,
    halves_spread,
)


def judge(a: np.ndarray, b: np.ndarray, percent: float, again: Sequence[np.ndarray] = ()) -> Judgement:
    """Of one percentile."""
    (judgement,) = spread.judge(a, b, (percent,), again)
    return judgement


def latencies(seed: int, count: int, *, rho: float = 0.7, slow_seconds: float = 0.0) -> np.ndarray:
    """Log-normal round 10, each sample rho of the one before; some stretches of thirty slower by slow_seconds."""
    rng = np.random.default_rng(seed)
    noise, series = rng.standard_normal(count), np.empty(count)
    series[0] = noise[0]
    for k in range(1, count):
        series[k] = rho * series[k - 1] + np.sqrt(1 - rho * rho) * noise[k]
    stretches = np.repeat(rng.random(count // 30 + 1) < 0.3, 30)[:count]
    return 10 * np.exp(0.1 * series) + slow_seconds * stretches


@pytest.mark.parametrize("count", [0, 1, 79])
def test_few_samples_are_not_judged(count: int):
    assert cut(np.ones(count)) is None
    verdict = judge(np.ones(count), np.ones(1000), 50)
    assert (verdict.verdict, verdict.a, verdict.change) == (UNKNOWN, None, None)


def test_a_tail_needs_samples_in_each_half():
    assert judge(latencies(0, 150), latencies(1, 150), 99).verdict == UNKNOWN
    assert judge(latencies(0, 300), latencies(1, 300), 99).verdict == SAME


@pytest.mark.parametrize("count", [80, 320, 1000])
def test_blocks_keep_every_sample_and_its_percentiles(count: int):
    series = latencies(0, count)
    blocks = cut(series)
    assert blocks is not None
    assert blocks.counts.sum() == count
    middle = blocks.percentiles(np.ones((1, len(blocks.counts))), (50,))[0, 0]
    assert middle == np.percentile(series, 50, method="inverted_cdf")


def test_a_long_run_keeps_its_percentiles():
    series = latencies(0, 20_000)
    blocks = cut(series)
    assert blocks is not None
    assert blocks.counts.sum() == 20_000
    found = blocks.percentiles(np.ones((1, len(blocks.counts))), (50, 95, 99, 99.9))[0]
    assert found == pytest.approx(np.percentile(series, (50, 95, 99, 99.9)), rel=2e-3)


def test_a_run_does_not_differ_from_itself():
    series = latencies(0, 300)
    assert judge(series, series, 50).verdict == SAME


def test_runs_that_are_all_one_value_are_the_same_and_one_more_is_not():
    assert judge(np.full(200, 5.0), np.full(200, 5.0), 50).verdict == SAME
    assert judge(np.full(200, 5.0), np.full(200, 5.02), 50).verdict == SAME
    assert judge(np.full(200, 5.0), np.full(200, 5.2), 50).verdict == SLOWER


@pytest.mark.parametrize("percent", [50, 95, 99])
def test_runs_of_the_same_are_told_the_same(percent: int):
    verdicts = [judge(latencies(k, 400), latencies(k + 100, 400), percent).verdict for k in range(5)]
    assert verdicts.count(SAME) >= 4


def test_what_was_planted_is_found_both_ways():
    a, b = latencies(0, 300), 1.2 * latencies(1, 300)
    found = judge(a, b, 50)
    assert (found.verdict, judge(b, a, 50).verdict) == (SLOWER, FASTER)
    assert found.change == pytest.approx(0.2, abs=0.04)
    assert 0 < (found.low or 0) < (found.b or 0) - (found.a or 0) < (found.high or 0)


def test_slow_stretches_widen_the_spread():
    calm, rough = cut(latencies(0, 600)), cut(latencies(0, 600, slow_seconds=8.0))
    assert calm is not None
    assert rough is not None
    assert halves_spread(rough, (70,))[0] > 3 * halves_spread(calm, (70,))[0]
    ((low,), (high,)) = difference_interval(calm, rough, (50,))
    assert high - low > 0


def test_a_further_run_of_the_same_widens_what_counts_as_the_same():
    a, b = latencies(0, 300), 1.2 * latencies(1, 300)
    assert judge(a, b, 50, [1.25 * latencies(2, 300)]).verdict == SAME
    assert judge(a, b, 50, [1.01 * latencies(2, 300)]).verdict == SLOWER
    assert judge(a, b, 50, [latencies(2, 20)]).verdict == UNKNOWN


def test_percentiles_are_judged_each_by_itself():
    verdicts = spread.judge(latencies(0, 150), 1.3 * latencies(1, 150), (50, 95, 99))
    assert [(j.percent, j.verdict) for j in verdicts] == [(50, SLOWER), (95, SLOWER), (99, UNKNOWN)]
