"""Which columns of a dataset are which numbers of a robot: data, from the defaults or from a TOML table.

    [views]
    top = "observation.images.front"
    [state]
    arm_joints = { column = "observation.state[0:5]", scale = 0.017453292519943295 }    # degrees
    gripper = "observation.state[5:6]"
    [action]
    arm_joints = { column = "action[0:5]", kind = "absolute" }
    [marks]
    contact = "event.contact"
    [extra]
    target_m = "observation.environment_state"

A table that is left out has its default: view v is observation.images.v; the keys of the state lie side by side in
observation.state and those of the action in action, in the embodiment's order; an event e is event.e where the dataset
has it; nothing extra.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onbeat.embodiment.robot import KINDS, Embodiment, StateKey
from onbeat.embodiment.slots import suggest
from onbeat.training.data.layout import DataError, Feature
from onbeat.training.data.sample import MARKS

STATE, ACTION, IMAGES, EVENTS = "observation.state", "action", "observation.images.", "event."
RANGE = re.compile(r"(?P<column>.+?)(?:\[(?P<start>\d+):(?P<stop>\d+)\])?")
TABLES = ("views", "state", "action", "marks", "extra")


@dataclass(frozen=True, slots=True)
class Part:
    """Numbers [start, stop) of a column. The robot's numbers are scale * value + offset.

    kind: what an action's rows are as recorded, one of embodiment.robot.KINDS; None: as the embodiment has them.
    """

    column: str
    start: int
    stop: int
    scale: float = 1.0
    offset: float = 0.0
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """A dataset in a robot's terms. views: a camera per view. state, action: a part per key. marks: a column per event.

    extra: further columns or cameras, by the name that a sample gives them.
    """

    views: Mapping[str, str]
    state: Mapping[str, Part]
    action: Mapping[str, Part]
    marks: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)


def read_columns(
    document: Mapping[str, Any], robot: Embodiment, views: Sequence[str], features: Mapping[str, Feature], where: str
) -> Columns:
    """The columns of a TOML table, checked against robot and dataset. where: named in errors. Raises DataError."""
    _check_names(document, TABLES, where)
    own = {name: IMAGES + name for name in views}
    marks = {name: EVENTS + name for name in MARKS if EVENTS + name in features}
    columns = Columns(
        views=_names(document.get("views", own), tuple(views), f"{where}: [views]"),
        state=_parts(document.get("state"), robot.state, STATE, f"{where}: [state]"),
        action=_parts(document.get("action"), robot.action, ACTION, f"{where}: [action]"),
        marks=document.get("marks", marks),
        extra=document.get("extra", {}),
    )
    _check_names(columns.marks, MARKS, f"{where}: [marks]")
    _check_columns(columns, robot, features, where)
    for side, parts in (("state", columns.state), ("action", columns.action)):
        if side not in document:
            _check_whole(parts, features, f"{where}: the {side} of {robot.name}")
    return columns


def _names(given: Mapping[str, Any], wanted: Sequence[str], where: str) -> dict[str, Any]:
    _check_names(given, wanted, where)
    missing = [name for name in wanted if name not in given]
    if missing:
        raise DataError(f"{where}: '{missing[0]}' is missing: name its column")
    return {name: given[name] for name in wanted}


def _parts(given: Mapping[str, Any] | None, keys: Sequence[StateKey], column: str, where: str) -> dict[str, Part]:
    if given is None:
        stops = [sum(key.size for key in keys[: k + 1]) for k in range(len(keys))]
        return {key.name: Part(column, stop - key.size, stop) for key, stop in zip(keys, stops, strict=True)}
    chosen = _names(given, [key.name for key in keys], where)
    return {key.name: _part(chosen[key.name], key, f"{where} {key.name}") for key in keys}


def _part(given: Any, key: StateKey, where: str) -> Part:
    fields: dict[str, Any] = {"column": given} if isinstance(given, str) else dict(given)
    _check_names(fields, ("column", "scale", "offset", "kind"), where)
    match = RANGE.fullmatch(str(fields.pop("column", "")))
    if match is None:
        raise DataError(f"{where}: name a column, or numbers of one as name[start:stop]")
    if fields.get("kind") not in (None, *KINDS):
        raise DataError(f"{where}: '{fields['kind']}' is no kind: {suggest(str(fields['kind']), KINDS)}")
    start = int(match["start"] or 0)
    return Part(match["column"], start, int(match["stop"] or key.size), **fields)


def _check_columns(columns: Columns, robot: Embodiment, features: Mapping[str, Feature], where: str) -> None:
    for view, column in columns.views.items():
        if not _feature(features, column, f"{where}: view '{view}'").is_camera or features[column].is_depth:
            raise DataError(f"{where}: '{column}' is no colour camera: name one for view '{view}'")
    for side, keys, parts in (("state", robot.state, columns.state), ("action", robot.action, columns.action)):
        for key in keys:
            _check_part(parts[key.name], key, features, f"{where}: {side} '{key.name}' of {robot.name}")
    for name, column in (*columns.marks.items(), *columns.extra.items()):
        _feature(features, column, f"{where}: '{name}'")


def _check_part(part: Part, key: StateKey, features: Mapping[str, Feature], where: str) -> None:
    feature = _feature(features, part.column, where)
    if not feature.is_number or part.stop - part.start != key.size or part.stop > feature.width:
        raise DataError(
            f"{where} takes {key.size} numbers, and '{part.column}' gives {part.start} to {part.stop} of "
            f"{feature.width}: name the right ones"
        )


def _check_whole(parts: Mapping[str, Part], features: Mapping[str, Feature], where: str) -> None:
    """Refuse a column that has more numbers than its keys: it is another robot's."""
    column, taken = next(iter(parts.values())).column, max(part.stop for part in parts.values())
    if taken < features[column].width:
        raise DataError(
            f"{where} takes {taken} numbers, and '{column}' has {features[column].width}: "
            "it is for another robot, or say which numbers are meant"
        )


def _feature(features: Mapping[str, Feature], column: str, where: str) -> Feature:
    if column not in features:
        raise DataError(f"{where}: the dataset has no column '{column}': {suggest(str(column), features)}")
    return features[column]


def _check_names(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise DataError(f"{where}: unknown name '{name}': {suggest(name, known)}")
