"""Statistics of a data set as checkpoints carry them: `<dataset>_metadata.json`, in each of its published forms.

    {name: {statistics, modalities, embodiment_tag}}                          merged
    {name: {...}, name_variants: {variant: {statistics, ...}, ...}}           merged, and one set per task or embodiment
    {name: {variant: {statistics, ...}, ...}}                                 older, nested
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.normalisation import MODES, STATISTICS, KeyStatistics
from onbeat.embodiment.robot import Embodiment, StateKey
from onbeat.embodiment.slots import suggest

MERGED = "merged"
AUTO = "auto"  # the published loader's silent choice: the first variant, or the merged set where there are none
LEVELS = ("task", "embodiment")  # the first variant of that stats_level
SUFFIX = "_metadata.json"
FOLDERS = (".", "experiment_cfg")


class MetadataError(OnbeatError):
    """No statistics, or not of the form or for the robot that is asked."""


class AmbiguousVariant(MetadataError):
    """Several sets of statistics could apply and none is named: name one."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """One set of statistics. variant: the name under which it was found, "merged" for the data set's own."""

    dataset: str
    variant: str
    state: Mapping[str, KeyStatistics]
    action: Mapping[str, KeyStatistics]

    def to_json(self) -> dict[str, Any]:
        """The contents of a metadata file that holds this set alone, under the name it was found by."""
        sides = {"state": self.state, "action": self.action}
        entry = {"statistics": {side: _listed(keys) for side, keys in sides.items()}}
        return {self.dataset: entry} if self.variant == MERGED else {f"{self.dataset}_variants": {self.variant: entry}}


def load_statistics(folder: Path, dataset: str | None = None, variant: str | None = None) -> Statistics:
    """The statistics of a checkpoint or bundle folder; they lie in its root or in experiment_cfg/.

    dataset: which file; may be None when there is one. variant: a name, "merged", "task", "embodiment", or "auto" (the
    published loader's silent choice, for replaying its records); None refuses to guess between several.
    Raises MetadataError.
    """
    path = _metadata_file(folder, dataset)
    name = path.name.removesuffix(SUFFIX)
    document = _read(path)
    merged, variants = _forms(document, name, path)
    taken = _choose(merged is not None, variants, variant, path)
    entry = merged if taken == MERGED and merged is not None else variants[taken]
    sides = {side: _side(entry, side, f"{path} ({taken})") for side in ("state", "action")}
    return Statistics(name, taken, sides["state"], sides["action"])


def check_statistics(statistics: Statistics, robot: Embodiment) -> None:
    """Raise MetadataError unless there is a finite number for every number that the robot's normalisation needs."""
    for side, keys, known in (("state", robot.state, statistics.state), ("action", robot.action, statistics.action)):
        for key in keys:
            _check_key(side, key, known.get(key.name), statistics)


def measure(rows: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The six statistics of values (N, d), each (d,) float64."""
    q01, q99 = np.quantile(rows, (0.01, 0.99), axis=0)
    return {
        "min": rows.min(axis=0),
        "max": rows.max(axis=0),
        "mean": rows.mean(axis=0),
        "std": rows.std(axis=0),
        "q01": q01,
        "q99": q99,
    }


def save_statistics(statistics: Statistics, folder: Path) -> Path:
    """Write `<dataset>_metadata.json` with this set alone; returns its path."""
    path = folder / f"{statistics.dataset}{SUFFIX}"
    path.write_text(json.dumps(statistics.to_json(), indent=1) + "\n", encoding="utf-8")
    return path


def _metadata_file(folder: Path, dataset: str | None) -> Path:
    found = {path.name: path for sub in reversed(FOLDERS) for path in sorted((folder / sub).glob(f"*{SUFFIX}"))}
    if dataset is not None:
        if f"{dataset}{SUFFIX}" in found:
            return found[f"{dataset}{SUFFIX}"]
        names = [name.removesuffix(SUFFIX) for name in found]
        remedy = suggest(dataset, names) if names else f"put {dataset}{SUFFIX} there"
        raise MetadataError(f"no statistics of data set '{dataset}' in {folder}: {remedy}")
    if len(found) == 1:
        return next(iter(found.values()))
    names = ", ".join(name.removesuffix(SUFFIX) for name in found) or "none"
    raise MetadataError(f"{folder} holds statistics of {names}: name one data set")


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MetadataError(f"{path} is no readable JSON ({error}): copy it again from the checkpoint") from None
    if not isinstance(document, dict):
        raise MetadataError(f"{path} holds no table of data sets: copy it again from the checkpoint")
    return document


def _forms(document: dict[str, Any], name: str, path: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The merged set, if there is one, and the variants by name, whichever form the file has."""
    top = _table(document.get(name, {}), f"{path}: '{name}'")
    merged = top if "statistics" in top else None
    nested = {} if merged else {k: v for k, v in top.items() if isinstance(v, dict) and "statistics" in v}
    beside = f"{name}_variants"
    variants = nested | _table(document.get(beside, {}), f"{path}: '{beside}'")
    for variant, entry in variants.items():
        _table(entry, f"{path}: variant '{variant}'")
    if merged is None and not variants:
        raise MetadataError(f"{path} has no entry '{name}' with statistics: rename the file after its data set")
    return merged, variants


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MetadataError(f"{where} is {type(value).__name__}, not a table: copy the file again from the checkpoint")
    return value


def _choose(has_merged: bool, variants: Mapping[str, Any], wanted: str | None, path: Path) -> str:
    names = ([MERGED] if has_merged else []) + list(variants)
    if wanted in names:
        return wanted
    if wanted == AUTO:
        return next(iter(variants), MERGED)
    if wanted in LEVELS:
        at_level = [name for name, entry in variants.items() if entry.get("stats_level") == wanted]
        if at_level:
            return at_level[0]
    if wanted is not None:
        raise MetadataError(f"{path} has no variant '{wanted}': {suggest(wanted, names)}")
    if len(names) > 1:
        raise AmbiguousVariant(f"{path} has several sets of statistics: name one variant of {', '.join(names)}")
    return names[0]


def _side(entry: Mapping[str, Any], side: str, where: str) -> dict[str, KeyStatistics]:
    statistics = _table(entry.get("statistics"), f"{where}: 'statistics'")
    keys = _table(statistics.get(side, {}), f"{where}: {side} statistics")
    try:
        return {key: _key_statistics(_table(values, f"{where}: {side} '{key}'")) for key, values in keys.items()}
    except (TypeError, ValueError) as error:
        raise MetadataError(f"{where}: {side} statistics are no numbers ({error}): copy the file again") from None


def _key_statistics(values: Mapping[str, Any]) -> KeyStatistics:
    return {name: np.atleast_1d(np.array(values[name], np.float64)) for name in STATISTICS if name in values}


def _check_key(side: str, key: StateKey, known: KeyStatistics | None, statistics: Statistics) -> None:
    for need in MODES[key.normalisation].needs if key.normalisation else ():
        values = (known or {}).get(need)
        where = f"'{need}' of {side} '{key.name}' in data set '{statistics.dataset}' ({statistics.variant})"
        size = key.stop - key.start
        if values is None:
            raise MetadataError(f"{where} is missing: take the metadata of a checkpoint of this embodiment")
        if values.shape != (size,) or not np.isfinite(values).all():
            raise MetadataError(f"{where} must be {size} finite numbers: take the metadata of this embodiment")


def _listed(keys: Mapping[str, KeyStatistics]) -> dict[str, dict[str, list[float]]]:
    return {key: {name: values.tolist() for name, values in known.items()} for key, known in keys.items()}
