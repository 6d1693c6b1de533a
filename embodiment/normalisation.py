"""Between a robot's units and the network's: one pair of functions per mode, exact to the published transforms.

Arithmetic is in the input's own float type, with the statistics rounded to it first, as the published code does: a
float64 state is normalised in float64 and rounded to float32 once, at the end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

STATISTICS = ("min", "max", "mean", "std", "q01", "q99")
KeyStatistics = Mapping[str, NDArray[np.float64]]  # each of STATISTICS that is known, (d,)


@dataclass(frozen=True, slots=True)
class Mode:
    """A normalisation: the statistics it reads, and the two directions. `inverse` never clamps."""

    needs: tuple[str, ...]
    forward: Callable[..., Array]
    inverse: Callable[..., Array]


def normalise(values: Array, mode: str, statistics: KeyStatistics) -> Array:
    """Robot values (..., d) in the network's units. Same shape and float type."""
    return MODES[mode].forward(values, *_bounds(values, mode, statistics))


def unnormalise(values: Array, mode: str, statistics: KeyStatistics) -> Array:
    """Network values (..., d) in the robot's units. Same shape and float type. Does not clamp."""
    return MODES[mode].inverse(values, *_bounds(values, mode, statistics))


def _bounds(values: Array, mode: str, statistics: KeyStatistics) -> list[Array]:
    return [statistics[name].astype(values.dtype) for name in MODES[mode].needs]


def _divide(numerator: Array, denominator: Array, where_zero: Array) -> Array:
    """numerator / denominator, and `where_zero` in the columns whose denominator is 0."""
    is_zero = denominator == 0
    return np.where(is_zero, where_zero, numerator / np.where(is_zero, denominator.dtype.type(1), denominator))


def _stretch(x: Array, low: Array, high: Array) -> Array:
    """[-1, 1] to [low, high]."""
    return (x + 1) / 2 * (high - low) + low


def _from_quantiles(x: Array, q01: Array, q99: Array) -> Array:
    span = q99 - q01
    scaled = 2 * _divide(x - q01, span, np.zeros_like(x)) - 1
    return np.clip(np.where(span == 0, x, scaled), -1, 1)


def _from_range(x: Array, low: Array, high: Array) -> Array:
    span = high - low
    return np.where(span == 0, x.dtype.type(0), 2 * _divide(x - low, span, np.zeros_like(x)) - 1)


def _largest(low: Array, high: Array) -> Array:
    return np.maximum(np.abs(low), np.abs(high))


def _is_on(x: Array) -> Array:
    return (x > 0.5).astype(x.dtype)


MODES = {
    "q99": Mode(("q01", "q99"), _from_quantiles, _stretch),
    "min_max": Mode(("min", "max"), _from_range, _stretch),
    "mean_std": Mode(
        ("mean", "std"), lambda x, mean, std: _divide(x - mean, std, x), lambda x, mean, std: x * std + mean
    ),
    "binary": Mode((), _is_on, _is_on),
    "scale": Mode(
        ("min", "max"),
        lambda x, low, high: _divide(x, _largest(low, high), np.zeros_like(x)),
        lambda x, low, high: x * _largest(low, high),
    ),
}
