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

from collections.abc import Sequence
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
DISTINCT: Final = 2048  # values that are told apart; the largest DISTINCT / 2 of a long run are kept exactly

FASTER, SLOWER, SAME, UNKNOWN = "faster", "slower", "no difference", "too few samples"

# N samples, B blocks, K distinct values, R draws.


@dataclass(frozen=True, slots=True)
class Blocks:
    """A run's samples in blocks. values: (K,) ascending. counts: (B, K), how many of a block's samples have a value."""

    values: NDArray[np.float64]
    counts: NDArray[np.float64]

    def percentiles(self, weights: NDArray[np.float64], percent: float) -> NDArray[np.float64]:
        """The least value with `percent` of the samples at or below it, (R,). weights: (R, B), of the blocks."""
        at_or_below = np.cumsum(weights @ self.counts, axis=1)
        reached = at_or_below >= at_or_below[:, -1:] * (percent / 100) - 1e-9
        return self.values[np.argmax(reached, axis=1)]


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
    values = np.unique(series)
    if len(values) <= DISTINCT:
        return values
    body = np.linspace(0, len(values) - DISTINCT // 2, DISTINCT // 2, endpoint=False).astype(int)
    return np.concatenate((values[body], values[-(DISTINCT // 2) :]))


def halves_spread(blocks: Blocks, percent: float, seed: int = 0) -> float:
    """How far the percentile of one half of the run lies from that of the other, in all but 1 - LEVEL of the deals."""
    count = len(blocks.counts)
    deal = np.argsort(np.random.default_rng(seed).random((DRAWS, count)), axis=1) % 2
    one, other = (blocks.percentiles(weights.astype(np.float64), percent) for weights in (deal, 1 - deal))
    return float(np.quantile(np.abs(one - other), LEVEL))


def difference_interval(a: Blocks, b: Blocks, percent: float, seed: int = 0) -> tuple[float, float]:
    """The LEVEL interval of the percentile of b less that of a."""
    generator = np.random.default_rng(seed)
    drawn = [blocks.percentiles(_redraw(generator, len(blocks.counts)), percent) for blocks in (a, b)]
    low, high = np.quantile(drawn[1] - drawn[0], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


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


def judge(a: ArrayLike, b: ArrayLike, percent: float, again: Sequence[ArrayLike] = ()) -> Judgement:
    """Compare a percentile of two runs. again: further runs of what `a` is, which tell how far processes lie apart."""
    series = [np.asarray(run, np.float64).reshape(-1) for run in (a, b, *again)]
    runs = [blocks for run in series if supports(len(run) // 2, percent) and (blocks := cut(run)) is not None]
    if len(runs) < len(series):
        return Judgement(percent, None, None, None, None, None, UNKNOWN)
    figures = [float(np.percentile(run, percent)) for run in series]
    by_chance = [halves_spread(run, percent) for run in runs] + [abs(figure - figures[0]) for figure in figures[2:]]
    spread = max(*by_chance, LEAST_SHARE * abs(figures[0]))
    low, high = difference_interval(runs[0], runs[1], percent)
    verdict = _verdict(figures[1] - figures[0], spread, low, high)
    return Judgement(percent, figures[0], figures[1], spread, low, high, verdict)


def _verdict(difference: float, spread: float, low: float, high: float) -> str:
    if abs(difference) <= spread or low <= 0 <= high:
        return SAME
    return SLOWER if difference > 0 else FASTER
