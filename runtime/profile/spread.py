"""How far a figure may move by itself, and whether two runs differ by more: A/A spread and verdicts, on plain arrays.

Latencies of one run hang together: a slow second makes two hundred slow ticks. So samples are never taken for
independent. A run is cut into blocks of consecutive samples, and only whole blocks are dealt out:

    A/A spread   the blocks dealt into two halves at random, again and again: how far a percentile of one half lies
                 from that of the other, at most, in all but one of a hundred deals
    interval     the blocks of each run drawn with replacement: the 99 % interval of the difference between two runs

Two runs differ where the difference is beyond the A/A spread of both and its interval is clear of zero. Half a run says
less than a whole one, so the spread is rather too wide: a verdict errs towards "no difference". docs/decisions/0027.
Source: Künsch, "The jackknife and the bootstrap for general stationary observations", 1989, for drawing blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onbeat.runtime.measures import supports

MOST_BLOCKS: Final = 32
LEAST_BLOCKS: Final = 8
LEAST_IN_BLOCK: Final = 10
DRAWS: Final = 500
LEVEL: Final = 0.99
LEAST_SHARE: Final = 0.01  # of a figure: less than that is no difference, however sure
DISTINCT: Final = 1024  # values of a long run that are told apart

FASTER, SLOWER, SAME, UNKNOWN = "faster", "slower", "no difference", "too few samples"

# N samples, B blocks, K distinct values, R draws, Q percentiles.


@dataclass(frozen=True, slots=True)
class Blocks:
    """A run's samples in blocks. values: (K,) ascending. counts: (B, K), how many of a block's samples have a value."""

    values: NDArray[np.float64]
    counts: NDArray[np.float64]

    def percentiles(self, weights: NDArray[np.float64], percents: Sequence[float]) -> NDArray[np.float64]:
        """(R, Q): per percentile the least value with that share of the samples at or below it. weights: (R, B)."""
        at_or_below = np.cumsum(weights @ self.counts, axis=1)
        wanted = at_or_below[:, -1:] * (np.asarray(percents) / 100) - 1e-9
        places = [np.searchsorted(row, goals) for row, goals in zip(at_or_below, wanted, strict=True)]
        return self.values[np.minimum(places, len(self.values) - 1)]


def cut(samples: ArrayLike) -> Blocks | None:
    """Samples (N,) in the order they came, cut into blocks; None when there are too few to say anything."""
    series = np.asarray(samples, np.float64).reshape(-1)
    blocks = min(MOST_BLOCKS, len(series) // LEAST_IN_BLOCK)
    if blocks < LEAST_BLOCKS:
        return None
    values = _distinct(series)
    place = np.minimum(np.searchsorted(values, series), len(values) - 1)
    block = np.arange(len(series)) * blocks // len(series)
    counts = np.zeros((blocks, len(values)))
    np.add.at(counts, (block, place), 1.0)
    return Blocks(values, counts)


def _distinct(series: NDArray[np.float64]) -> NDArray[np.float64]:
    """All values, or of many those of even ranks, and more of them the nearer to the largest."""
    values = np.unique(series)
    if len(values) <= DISTINCT:
        return values
    even = np.linspace(0, len(values) - 1, DISTINCT // 2).astype(int)
    from_the_largest = len(values) - np.geomspace(1, len(values), DISTINCT // 2).astype(int)
    return values[np.union1d(even, from_the_largest)]


def halves_spread(blocks: Blocks, percents: Sequence[float], seed: int = 0) -> NDArray[np.float64]:
    """(Q,): how far the percentiles of one half of a run lie from those of the other, in all but 1 - LEVEL of deals."""
    count = len(blocks.counts)
    deal = np.argsort(np.random.default_rng(seed).random((DRAWS, count)), axis=1) % 2
    one, other = (blocks.percentiles(weights.astype(np.float64), percents) for weights in (deal, 1 - deal))
    return np.quantile(np.abs(one - other), LEVEL, axis=0)


def difference_interval(a: Blocks, b: Blocks, percents: Sequence[float], seed: int = 0) -> NDArray[np.float64]:
    """(2, Q): the LEVEL interval of the percentiles of b less those of a."""
    generator = np.random.default_rng(seed)
    of_a, of_b = (blocks.percentiles(_redraw(generator, len(blocks.counts)), percents) for blocks in (a, b))
    return np.quantile(of_b - of_a, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)


def _redraw(generator: np.random.Generator, count: int) -> NDArray[np.float64]:
    return generator.multinomial(count, np.full(count, 1 / count), DRAWS).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Judgement:
    """One percentile of one stage in two runs, in the samples' unit; None where there are too few samples.

    spread: how far runs of the same may lie apart. verdict: of b, one of FASTER, SLOWER, SAME, UNKNOWN.
    """

    percent: float
    a: float | None
    b: float | None
    spread: float | None
    low: float | None
    high: float | None
    verdict: str

    @property
    def change(self) -> float | None:
        """Of b against a, as a share of a."""
        return None if self.a is None or self.b is None or self.a == 0 else (self.b - self.a) / self.a


def judge(
    a: ArrayLike, b: ArrayLike, percents: Sequence[float], again: Sequence[ArrayLike] = ()
) -> tuple[Judgement, ...]:
    """Compare percentiles of two runs. again: further runs of what `a` is: how far they all lie apart is no difference.

    One process may be slower than the next for all its life (where its memory lies, how its camera's frames fall on
    policy steps); no deal of one run's blocks can show that.
    """
    series = [np.asarray(run, np.float64).reshape(-1) for run in (a, b, *again)]
    told = [percent for percent in percents if all(supports(len(run) // 2, percent) for run in series)]
    runs = [blocks for run in series if (blocks := cut(run)) is not None]
    known = {j.percent: j for j in _judge(series, runs, told)} if told and len(runs) == len(series) else {}
    unknown = (None, None, None, None, None, UNKNOWN)
    return tuple(known.get(percent, Judgement(percent, *unknown)) for percent in percents)


def _judge(
    series: Sequence[NDArray[np.float64]], runs: Sequence[Blocks], percents: Sequence[float]
) -> Iterator[Judgement]:
    """series, runs: of a, of b, and of the others that are what a is."""
    figures = np.array([np.percentile(run, percents) for run in series])
    of_a = np.delete(figures, 1, axis=0)
    apart = np.vstack([np.ptp(of_a, axis=0), *(halves_spread(run, percents) for run in runs)])
    spreads = np.maximum(apart.max(axis=0), LEAST_SHARE * np.abs(figures[0]))
    lows, highs = difference_interval(runs[0], runs[1], percents)
    for percent, a, b, spread, low, high in zip(percents, *figures[:2], spreads, lows, highs, strict=True):
        verdict = _verdict(b - a, spread, low, high)
        yield Judgement(percent, float(a), float(b), float(spread), float(low), float(high), verdict)


def _verdict(difference: float, spread: float, low: float, high: float) -> str:
    if abs(difference) <= spread or low <= 0 <= high:
        return SAME
    return SLOWER if difference > 0 else FASTER
