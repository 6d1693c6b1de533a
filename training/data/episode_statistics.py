"""What LeRobot keeps with each episode and, combined, with the dataset: its own file for its own normalisers.

Onbeat normalises by `<dataset>_metadata.json` instead (statistics.py), whose quantiles are exact; here, as in LeRobot,
a dataset's quantiles are the mean of its episodes' ones, weighted by their rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
IMAGES, PIXEL_STRIDE = 100, 4  # of an episode: LeRobot too looks at a part of the pixels

Figures = dict[str, NDArray[Any]]


def number_statistics(values: NDArray[Any]) -> Figures:
    """Of (T, ...) numbers: each figure has the shape of a row."""
    return _figures(values.astype(np.float64), axis=0)


def image_statistics(frames: NDArray[Any]) -> Figures:
    """Of colour frames (T, H, W, 3) in 0..1: each figure (3, 1, 1).

    Of depth (T, H, W) in its own unit, thrice the same, since LeRobot wants three of every image.
    """
    taken = frames[np.unique(np.linspace(0, len(frames) - 1, IMAGES, dtype=int)), ::PIXEL_STRIDE, ::PIXEL_STRIDE]
    if taken.ndim == 3:
        taken = np.repeat(taken[..., None], 3, axis=-1)
    scale = 255.0 if frames.dtype == np.uint8 else 1.0
    figures = _figures(taken.reshape(-1, taken.shape[-1]) / scale, axis=0)
    count = figures.pop("count")
    return {**{name: value.reshape(-1, 1, 1) for name, value in figures.items()}, "count": 0 * count + len(taken)}


def combine_statistics(parts: Sequence[Mapping[str, Figures]]) -> dict[str, Figures]:
    """Of several episodes or datasets with the same columns, as one."""
    return {name: _combine([part[name] for part in parts]) for name in parts[0]}


def _figures(values: NDArray[np.float64], axis: int) -> Figures:
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=axis)
    return {
        "min": values.min(axis=axis),
        "max": values.max(axis=axis),
        "mean": values.mean(axis=axis),
        "std": values.std(axis=axis),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def _combine(parts: Sequence[Figures]) -> Figures:
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    count = stacked["count"].sum(axis=0)
    weight = (stacked["count"] / count).reshape(-1, *([1] * (stacked["mean"].ndim - 1)))
    mean = (weight * stacked["mean"]).sum(axis=0)
    variance = (weight * (stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2)).sum(axis=0)
    spread = {"min": stacked["min"].min(axis=0), "max": stacked["max"].max(axis=0)}
    quantiles = {name: (weight * stacked[name]).sum(axis=0) for name in QUANTILES}
    return {**spread, "mean": mean, "std": np.sqrt(variance), "count": count, **quantiles}
