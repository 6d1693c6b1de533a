"""The few statistics our tables are made of: percentiles of a latency, and the interval around a success rate."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

PERCENTS = (50.0, 95.0, 99.0, 99.9)
Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, slots=True)
class Latency:
    """One row of a latency table, milliseconds. `n` samples.

    None is what they cannot tell: a percentile beyond which not one sample would be expected is the largest by another
    name, so the 95th takes more than 20 samples, the 99th more than 100, the 99.9th more than 1000.
    """

    n: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    p99_9_ms: float | None
    max_ms: float | None


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts (B,) of samples between edges (B + 1,), in the samples' own unit."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]


def summarise_ns(samples_ns: ArrayLike) -> Latency:
    """Percentiles of durations in nanoseconds, linear between samples as NumPy's default has it."""
    samples = np.asarray(samples_ns, np.float64).reshape(-1)
    figures = (percentile(samples, percent) for percent in PERCENTS)
    in_ms = (None if figure is None else figure / 1e6 for figure in figures)
    return Latency(int(samples.size), *in_ms, max_ms=float(samples.max() / 1e6) if samples.size else None)


def percentile(samples: NDArray[np.float64], percent: float) -> float | None:
    """Of samples (N,), in their unit; None when they are too few for it."""
    return float(np.percentile(samples, percent)) if supports(len(samples), percent) else None


def supports(n: int, percent: float) -> bool:
    """Whether more than one of n samples is to be expected beyond the percentile; the median wants no more than one."""
    return n > 0 and (percent <= 50 or n * (100 - percent) > 100 * (1 + 1e-9))


def wilson_interval(successes: int, attempts: int) -> tuple[float, float]:
    """The 95 % interval of a success rate, 0..1; (0, 1) when nothing was tried. Source: Wilson 1927, uncorrected."""
    assert 0 <= successes <= attempts, (successes, attempts)
    if attempts == 0:
        return 0.0, 1.0
    rate, z2 = successes / attempts, Z_95 * Z_95
    centre = rate + z2 / (2 * attempts)
    half = Z_95 * math.sqrt(rate * (1 - rate) / attempts + z2 / (4 * attempts * attempts))
    scale = 1 + z2 / attempts
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def histogram(samples: ArrayLike, bins: int) -> Histogram:
    """`bins` equal bins from the least sample to the greatest; a range of one unit when all are equal or none came."""
    values = np.asarray(samples, np.float64).reshape(-1)
    counts, edges = np.histogram(values, bins)
    return Histogram(edges, counts.astype(np.int64))


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[c]) for row in table) for c in range(len(header))]
    return "\n".join(
        "  ".join(_pad(cell, w, c) for c, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in table
    )


def figure(value: float | None, digits: int = 2) -> str:
    """A number for a table; a dash when it was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)
