"""Joining two chunks: the executed sequence of old rows, a bounded crossfade, and new rows; and how softly to guide.

H rows of a chunk, J joints. Both functions are about rows at the same times: row k of the old sequence is what the
robot is committed to when row k of the new chunk is due, NaN once nothing is.
"""

import math

import numpy as np
from numpy.typing import NDArray

from onbeat.kernels.compiled import compiled

Rows = NDArray[np.float64]


def splice_reference(old: Rows, new: Rows, first_row: int, blend_rows: int) -> Rows:
    """The sequence (H, J) to execute: `old` before `first_row`, `new` from there on, blended over at most `blend_rows`.

    old, new: (H, J). The blend ends where `old` does: its n rows get the weights 1/(n+1) ... n/(n+1) of the new, so
    that the first row behind it is the new one alone, and no step of the blend is larger than its share of the
    disagreement.
    """
    out = np.where(np.arange(len(new))[:, None] < first_row, old, new)
    fading = old[first_row : first_row + blend_rows]
    gaps = np.flatnonzero(np.isnan(fading).any(axis=1))
    rows = int(gaps[0]) if len(gaps) else len(fading)
    for k in range(rows):
        weight = (k + 1) / (rows + 1)
        row = first_row + k
        out[row] = old[row] + weight * (new[row] - old[row])
    return out


@compiled
def splice(old, new, first_row, blend_rows):
    """The compiled variant of `splice_reference`, in place: `old` becomes the sequence to execute."""
    length = new.shape[0]
    rows = _rows_to_blend(old, first_row, min(blend_rows, length - first_row))
    for row in range(first_row, length):
        weight = (row - first_row + 1) / (rows + 1)
        for joint in range(new.shape[1]):
            if weight < 1.0:
                old[row, joint] += weight * (new[row, joint] - old[row, joint])
            else:
                old[row, joint] = new[row, joint]


@compiled
def _rows_to_blend(old, first_row, most):
    for k in range(most):
        for value in old[first_row + k]:
            if math.isnan(value):
                return k
    return most


def _splice_numba(old: Rows, new: Rows, first_row: int, blend_rows: int) -> Rows:
    out = old.copy()
    splice(out, new, first_row, blend_rows)
    return out


VARIANTS = {"numpy": splice_reference, "numba": _splice_numba}


def guidance_weights(rows: int, delay: int, horizon: int) -> NDArray[np.float32]:
    """How strongly each of H = `rows` rows is pulled to the previous chunk: 1 below d, falling to 0 at row H - s.

    delay: d, rows that will have run when the chunk comes. horizon: s, policy steps until the next observation.
    Source: arXiv 2506.07339, eq. 5: with c = (H - s - i) / (H - s - d + 1), the weight is c (e^c - 1) / (e - 1).
    """
    end = max(rows - horizon, delay)
    c = np.maximum(0.0, (end - np.arange(rows)) / (end - delay + 1))
    soft = c * np.expm1(c) / math.expm1(1.0)
    return np.where(np.arange(rows) < delay, 1.0, soft).astype(np.float32)
