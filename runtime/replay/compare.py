"""Recorded against replayed, field by field and bit by bit: the first that differs, how many do, and by how much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# N records.


@dataclass(frozen=True, slots=True)
class Difference:
    """One place. t_ns: of the record, monotonic clock. number: of the tick or inference. field: with its index."""

    topic: str
    t_ns: int
    number: int
    field: str
    recorded: float | int
    replayed: float | int


@dataclass(frozen=True, slots=True)
class FieldReport:
    """One field of all records. differing: in how many. largest: absolute difference, nan where one is no number.

    noise: `largest` in units of the model's noise floor, None for a whole number or without a floor.
    """

    topic: str
    field: str
    records: int
    differing: int
    largest: float
    noise: float | None
    first: Difference


def compare(
    topic: str,
    recorded: NDArray[np.void],
    replayed: NDArray[np.void],
    fields: Sequence[str],
    *,
    t_field: str,
    floors: Mapping[str, float] | None = None,
) -> list[FieldReport]:
    """The fields that differ, in the order of their first difference. Arrays (N,) of one dtype.

    t_field: what says when a record is from. floors: field -> how far it moves by rounding alone.
    """
    assert recorded.dtype == replayed.dtype, topic
    assert len(recorded) == len(replayed), topic
    reports = [_report(topic, recorded, replayed, name, t_field, (floors or {}).get(name)) for name in fields]
    return sorted((r for r in reports if r is not None), key=lambda report: report.first.t_ns)


def _report(
    topic: str,
    recorded: NDArray[np.void],
    replayed: NDArray[np.void],
    name: str,
    t_field: str,
    floor: float | None,
) -> FieldReport | None:
    rows = np.flatnonzero(_differs(recorded[name], replayed[name]))
    if len(rows) == 0:
        return None
    first = _first(topic, recorded, replayed, int(rows[0]), name, t_field)
    largest = largest_difference(recorded[name][rows], replayed[name][rows])
    is_real = recorded.dtype[name].base.kind == "f"
    noise = largest / floor if is_real and floor else None
    return FieldReport(topic, name, len(recorded), len(rows), largest, noise, first)


def _differs(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """(N,): whether any bit of a record's field differs."""
    size = one.dtype.itemsize * int(np.prod(one.shape[1:]))
    rows = [np.ascontiguousarray(values).view(np.uint8).reshape(len(values), size) for values in (one, other)]
    return (rows[0] != rows[1]).any(axis=1)


def _first(
    topic: str, recorded: NDArray[np.void], replayed: NDArray[np.void], row: int, name: str, t_field: str
) -> Difference:
    one, other = (np.atleast_1d(records[name][row]) for records in (recorded, replayed))
    at = tuple(np.argwhere(_differs(one.reshape(-1), other.reshape(-1)).reshape(one.shape))[0].tolist())
    index = f"[{', '.join(map(str, at))}]" if recorded[name].ndim > 1 else ""
    t_ns, number = int(recorded[t_field][row]), int(recorded["number"][row])
    return Difference(topic, t_ns, number, f"{name}{index}", one[at].item(), other[at].item())


def largest_difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest absolute difference; places where neither is a number count as none, where one is as nan."""
    one, other = (np.asarray(values, np.float64) for values in (one, other))
    apart = np.where(np.isnan(one) & np.isnan(other), 0.0, np.abs(one - other))
    return float(apart.max()) if apart.size else 0.0
