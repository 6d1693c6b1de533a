"""The few statistics our tables are made of: percentiles of a latency, and the interval around a success rate."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, slots=True)
class Latency:
    """One row of a latency table, milliseconds. `n` samples; every figure is None when there are none."""

    n: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts (B,) of samples between edges (B + 1,), in the samples' own unit."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]


def summarise_ns(samples_ns: ArrayLike) -> Latency:
    """Percentiles of durations in nanoseconds, linear between samples as NumPy's default has it."""
    samples = np.asarray(samples_ns, np.float64).reshape(-1)
    if samples.size == 0:
        return Latency(0, None, None, None, None)
    p50, p95, p99 = np.percentile(samples, (50, 95, 99)) / 1e6
    return Latency(int(samples.size), float(p50), float(p95), float(p99), float(samples.max() / 1e6))


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
