"""What the rows of an action key mean, and the way there and back: absolute targets, steps, offsets from what was seen.

C rows, D numbers of all action keys in the order of `Embodiment.flatten`. The runtime knows absolute targets only. A
policy's numbers of the other kinds become such here, and a prefix of committed targets becomes the policy's numbers
again, against the newest observation: rows that were encoded against an older one would not mean the same any more.

    absolute                  a target
    delta_per_step            added to the target of the row before; the first to what was committed before it
    relative_to_observation   added to what the policy saw

Rotations are not added but composed, turns in the parent frame, as the published data has them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.robot import ABSOLUTE, DELTA_PER_STEP, RELATIVE_TO_OBSERVATION, ActionKey, Embodiment
from onbeat.embodiment.rotation import turn_between, turn_further

Rows = NDArray[np.floating[Any]]


def to_absolute(embodiment: Embodiment, rows: Rows, *, committed: Rows, observed: Rows) -> NDArray[np.float64]:
    """The policy's rows (C, D) as absolute targets (C, D).

    committed: (D,), the absolute target one row before the first. observed: (D,), what the policy saw, in the forms of
    the action keys.
    """
    return _by_key(embodiment, _absolute, rows, committed, observed)


def from_absolute(embodiment: Embodiment, targets: Rows, *, committed: Rows, observed: Rows) -> NDArray[np.float64]:
    """The inverse of `to_absolute`."""
    return _by_key(embodiment, _encoded, targets, committed, observed)


def _by_key(
    embodiment: Embodiment, convert: Callable[..., Rows], rows: Rows, committed: Rows, observed: Rows
) -> NDArray[np.float64]:
    out, stop = np.empty(rows.shape), 0
    for key in embodiment.action:
        start, stop = stop, stop + key.size
        own = slice(start, stop)
        out[:, own] = convert(key, rows[:, own], committed[own], observed[own])
    return out


def _absolute(key: ActionKey, rows: Rows, committed: Rows, observed: Rows) -> Rows:
    if key.kind == DELTA_PER_STEP:
        return _accumulate(key, rows, committed)
    return _moved(key, observed, rows) if key.kind == RELATIVE_TO_OBSERVATION else rows


def _encoded(key: ActionKey, targets: Rows, committed: Rows, observed: Rows) -> Rows:
    if key.kind == DELTA_PER_STEP:
        return _way(key, np.concatenate([committed[None], targets[:-1]]), targets)
    if key.kind == RELATIVE_TO_OBSERVATION:
        return _way(key, observed, targets)
    assert key.kind == ABSOLUTE, key.kind
    return targets


def _accumulate(key: ActionKey, steps: Rows, start: Rows) -> Rows:
    if key.rotation is None:
        return start + np.cumsum(steps, axis=0)
    targets = np.empty_like(steps)
    for row, step in enumerate(steps):
        start = targets[row] = turn_further(start, step, key.rotation)
    return targets


def _moved(key: ActionKey, start: Rows, by: Rows) -> Rows:
    return start + by if key.rotation is None else turn_further(start, by, key.rotation)


def _way(key: ActionKey, start: Rows, end: Rows) -> Rows:
    return end - start if key.rotation is None else turn_between(start, end, key.rotation)
