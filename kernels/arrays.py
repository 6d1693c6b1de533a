"""Copies and fills for compiled code: plain loops, where a slice assignment would bring an allocation for overlaps."""

from typing import Any

from numpy.typing import NDArray

from onbeat.kernels.compiled import compiled


@compiled
def copy_values(out: NDArray[Any], values: NDArray[Any]) -> None:
    """out[:] = values, (N,) each."""
    for k in range(out.shape[0]):
        out[k] = values[k]


@compiled
def fill_values(out: NDArray[Any], value: float) -> None:
    """out[:] = value, (N,)."""
    for k in range(out.shape[0]):
        out[k] = value
