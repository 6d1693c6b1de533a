"""Statistics of a robot's numbers in one pass over a dataset, exact, in memory with a bound that is known beforehand.

A quantile near an end is decided by the extreme values alone: of N rows, the 1 % quantile lies among the
floor((N - 1) / 100) + 2 smallest. Those are kept, and as many of the largest: 2 % of one column, twice that at the most
while rows arrive. N is known from the metadata. Minimum, maximum, mean and deviation need no more than themselves.

n rows arriving, d numbers of a key, k values kept of an end.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.metadata import MERGED, SUFFIX, Statistics
from onbeat.embodiment.normalisation import KeyStatistics
from onbeat.embodiment.robot import ABSOLUTE, ActionKey, Embodiment, StateKey
from onbeat.embodiment.rotation import AXIS_ANGLE, convert_rotation
from onbeat.training.data.robot_data import RobotData

OUTER = 0.01  # the quantile that is kept of either end
TASK, EMBODIMENT = "task", "embodiment"
MIXED = -1  # width of a key that robots have in different widths

Rows = NDArray[np.floating[Any]]


class Extremes:
    """The k smallest values of each of d columns. Largest: give it the values negated."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._parts: list[Rows] = []
        self._held = 0

    def add(self, rows: Rows) -> None:
        """More values (n, d)."""
        self._parts.append(rows)
        self._held += len(rows)
        if self._held > 2 * self._keep:
            self._parts = [self._smallest()]
            self._held = len(self._parts[0])

    def sorted(self) -> NDArray[np.float64]:
        """(at most k, d), rising."""
        return np.sort(self._smallest(), axis=0).astype(np.float64)

    def _smallest(self) -> Rows:
        rows = np.concatenate(self._parts)
        if len(rows) <= self._keep:
            return rows
        return np.partition(rows, self._keep - 1, axis=0)[: self._keep].copy()


class Measure:
    """The six statistics of (N, d) values that arrive in parts. rows: N, or more."""

    def __init__(self, rows: int) -> None:
        keep = math.floor((rows - 1) * OUTER) + 2
        self.count = 0
        self._low, self._high = Extremes(keep), Extremes(keep)
        self._mean: NDArray[np.float64] = np.zeros(1)
        self._squares: NDArray[np.float64] = np.zeros(1)

    def add(self, rows: Rows) -> None:
        """More values (n, d), n > 0."""
        self._low.add(rows)
        self._high.add(-rows)
        values = rows.astype(np.float64)
        count, mean = self.count + len(values), values.mean(axis=0)
        # Chan, Golub, LeVeque: the sum of squares about the mean of two parts together.
        apart = mean - self._mean
        squares = ((values - mean) ** 2).sum(axis=0)
        self._squares = self._squares + squares + apart**2 * (self.count * len(values) / count)
        self._mean = self._mean + apart * (len(values) / count)
        self.count = count

    def result(self) -> dict[str, NDArray[np.float64]]:
        """Each of normalisation.STATISTICS: (d,) float64; quantiles interpolated as NumPy does."""
        low, high = self._low.sorted(), -self._high.sorted()
        return {
            "min": low[0],
            "max": high[0],
            "mean": self._mean,
            "std": np.sqrt(self._squares / self.count),
            "q01": _between(low, self.count),
            "q99": _between(high, self.count),
        }


def _between(ordered: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The value OUTER of the way in from the end at which `ordered` begins."""
    place = (count - 1) * OUTER
    inner = math.floor(place)
    beyond = min(inner + 1, count - 1)
    return ordered[inner] + (ordered[beyond] - ordered[inner]) * (place - inner)


@dataclass(frozen=True, slots=True)
class Measured:
    """Statistics of one name, as checkpoints carry them. levels: what a variant is of, "task" or "embodiment".

    modalities: what the published files say of views and keys; empty where several robots were measured.
    """

    merged: Statistics
    variants: Mapping[str, Statistics]
    levels: Mapping[str, str]
    modalities: Mapping[str, Any] = field(default_factory=dict)
    tag: str | None = None

    def save(self, folder: Path) -> Path:
        """Write `<dataset>_metadata.json` in the published form; returns its path."""
        name = self.merged.dataset
        entry = self.merged.to_json()[name] | {"modalities": self.modalities, "embodiment_tag": self.tag}
        beside = {
            variant: found.to_json()[f"{name}_variants"][variant] | {"stats_level": self.levels[variant]}
            for variant, found in self.variants.items()
        }
        document = {name: entry} | ({f"{name}_variants": beside} if beside else {})
        path = folder / f"{name}{SUFFIX}"
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def measure_data(
    name: str, parts: Sequence[RobotData], chunk: int, episodes: Sequence[Sequence[int]] | None = None
) -> Measured:
    """Statistics of one or several datasets under one name, in one pass over each.

    chunk: rows, for actions that depend on their observation. episodes: numbers of those to take, per dataset; all by
    default. Variants: one per task where there are several, and one per robot where there are several.
    """
    chosen = episodes if episodes is not None else [range(len(part.dataset.episodes)) for part in parts]
    tasks = {
        task for part, own in zip(parts, chosen, strict=True) for e in own for task in part.dataset.episodes[e].tasks
    }
    robots = {part.robot.name: part.robot for part in parts}
    ledger = _Ledger(_bounds(parts, chosen, chunk))
    for part, own in zip(parts, chosen, strict=True):
        for episode in own:
            for task, side, rows in _episode_rows(part, episode, chunk):
                for variant in (MERGED, *_variants(task, part.robot.name, tasks, robots)):
                    ledger.add(variant, side, rows)
    levels = {task: TASK for task in sorted(tasks) if len(tasks) > 1}
    levels |= {robot: EMBODIMENT for robot in robots if len(robots) > 1}
    only = next(iter(robots.values())) if len(robots) == 1 else None
    return Measured(
        merged=ledger.statistics(name, MERGED),
        variants={variant: ledger.statistics(name, variant) for variant in levels},
        levels=levels,
        modalities=_modalities(parts[0]) if only else {},
        tag=(only.tags[0] if only.tags else only.name) if only else None,
    )


class _Ledger:
    """A Measure per variant, side and key. rows: an upper bound per variant.

    Of several robots, one name may mean different numbers: what differs in width has no merged statistics.
    """

    def __init__(self, rows: Mapping[str, int]) -> None:
        self._rows = rows
        self._measures: dict[tuple[str, str, str, int], Measure] = {}
        self._widths: dict[tuple[str, str, str], int] = {}

    def add(self, variant: str, side: str, values: Mapping[str, Rows]) -> None:
        for key, rows in values.items():
            place = variant, side, key
            if self._widths.setdefault(place, rows.shape[1]) != rows.shape[1]:
                self._widths[place] = MIXED
            self._measures.setdefault((*place, rows.shape[1]), Measure(self._rows[variant])).add(rows)

    def statistics(self, dataset: str, variant: str) -> Statistics:
        sides: dict[str, dict[str, KeyStatistics]] = {"state": {}, "action": {}}
        for (own, side, key, width), measure in self._measures.items():
            if own == variant and self._widths[own, side, key] == width:
                sides[side][key] = measure.result()
        return Statistics(dataset, variant, sides["state"], sides["action"])


def _bounds(parts: Sequence[RobotData], chosen: Sequence[Sequence[int]], chunk: int) -> dict[str, int]:
    bounds: dict[str, int] = {}
    for part, own in zip(parts, chosen, strict=True):
        for episode in (part.dataset.episodes[e] for e in own):
            rows = episode.length * (chunk if part.converts else 1)
            for variant in (MERGED, part.robot.name, *episode.tasks):
                bounds[variant] = bounds.get(variant, 0) + rows
    return bounds


def _variants(task: str, robot: str, tasks: set[str], robots: Mapping[str, Any]) -> list[str]:
    return ([task] if len(tasks) > 1 else []) + ([robot] if len(robots) > 1 else [])


def _episode_rows(part: RobotData, episode: int, chunk: int) -> Iterator[tuple[str, str, dict[str, Rows]]]:
    """(task, side, rows by key) of an episode, rotations as the network has them."""
    length = part.dataset.episodes[episode].length
    told = part.dataset.told(episode)
    for task in dict.fromkeys(told):
        frames = np.flatnonzero([own == task for own in told])
        state = part.state(episode, 0, length)
        yield task, "state", {key.name: _turned(key, state[key.name][frames]) for key in part.robot.state}
        for rows in _action_rows(part, episode, frames, chunk):
            yield task, "action", {key.name: _turned(key, rows[key.name]) for key in part.robot.action}


def _action_rows(part: RobotData, episode: int, frames: NDArray[np.int64], chunk: int) -> Iterator[Mapping[str, Rows]]:
    if not part.converts:
        recorded = part.actions(episode, 0, part.dataset.episodes[episode].length)
        yield {name: rows[frames] for name, rows in recorded.items()}
        return
    for frame in frames:
        found = part.chunk(episode, int(frame), chunk)
        yield {name: rows[found.inside] for name, rows in found.actions.items()}


def _turned(key: StateKey, rows: Rows) -> Rows:
    return rows if key.rotation is None else convert_rotation(rows, key.rotation, AXIS_ANGLE)


def _modalities(part: RobotData) -> dict[str, Any]:
    """What the published files say of views and keys."""
    cameras = {view: part.dataset.feature(column) for view, column in part.columns.views.items()}
    video = {
        view: {"resolution": [f.shape[1], f.shape[0]], "channels": f.shape[2], "fps": float(part.dataset.info.fps)}
        for view, f in cameras.items()
    }
    robot: Embodiment = part.robot
    return {
        "video": video,
        "state": {key.name: _key_modality(key, absolute=True) for key in robot.state},
        "action": {key.name: _key_modality(key, absolute=_is_absolute(key)) for key in robot.action},
    }


def _is_absolute(key: ActionKey) -> bool:
    return key.kind == ABSOLUTE


def _key_modality(key: StateKey, *, absolute: bool) -> dict[str, Any]:
    return {
        "absolute": absolute,
        "rotation_type": key.rotation,
        "shape": [key.size],
        "continuous": key.normalisation != "binary",
    }
