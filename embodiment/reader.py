"""Read an embodiment file (TOML); every complaint names the file, the line and the closest right name."""

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from onbeat.embodiment.normalisation import MODES
from onbeat.embodiment.robot import (
    CLIENT_IMAGES,
    KINDS,
    UNITS,
    ActionKey,
    Embodiment,
    EmbodimentError,
    Limits,
    StateKey,
)
from onbeat.embodiment.rotation import AXIS_ANGLE, ROTATION_SIZES
from onbeat.embodiment.slots import UNIFIED_DIM, Side, UnknownSlot, find_slot, suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NUMBER = (int, float)
TOP_FIELDS = {
    "title": str,
    "policy_period_ms": NUMBER,
    "views": list,
    "state": list,
    "action": list,
    "client_image": str,
    "data_configs": list,
    "datasets": list,
    "tags": list,
}
STATE_FIELDS = {"name": str, "slot": str, "rotation": str, "normalisation": str, "unit": str}
ACTION_FIELDS = {
    **STATE_FIELDS,
    "kind": str,
    "joints": list,
    "lower": list,
    "upper": list,
    "velocity": list,
    "acceleration": list,
    "client_scale": NUMBER,
    "client_offset": NUMBER,
}
TOP_REQUIRED = ("title", "policy_period_ms", "views", "state", "action")
HEADER = re.compile(r"\s*\[\[?[\w.]+\]\]?\s*(#.*)?$")
SLOT_RANGE = re.compile(r"(?P<name>\w+)(?:\[(?P<start>\d+):(?P<stop>\d+)\])?")
Entry = tuple[Side, int] | None  # the table of the file a field stands in: the n-th [[state]] or [[action]], or the top


def parse_embodiment(text: str, source: Path) -> Embodiment:
    """A robot from the text of its file; `source` is named in errors. Raises EmbodimentError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise EmbodimentError(f"{source}: {error}: correct the TOML syntax") from None
    return _Reader(text, source).embodiment(document)


class _Reader:
    """Checks one parsed file field by field; every complaint carries the line it is about."""

    def __init__(self, text: str, source: Path) -> None:
        self.lines = text.splitlines()
        self.source = source

    def embodiment(self, document: dict[str, Any]) -> Embodiment:
        self.check_fields(document, TOP_FIELDS, TOP_REQUIRED, None)
        if not document["policy_period_ms"] > 0:
            self.refuse("must be above 0: give the time between two rows of a chunk", None, "policy_period_ms")
        self.check_choice(document.get("client_image", "as_is"), CLIENT_IMAGES, None, "client_image")
        state = tuple(StateKey(**self.key(entry, ("state", i))) for i, entry in enumerate(document["state"]))
        action = tuple(self.action(entry, ("action", i)) for i, entry in enumerate(document["action"]))
        self.check_apart("state", state)
        self.check_apart("action", action)
        names = {name: tuple(document.get(name, ())) for name in ("views", "data_configs", "datasets", "tags")}
        return Embodiment(
            name=self.source.stem,
            title=document["title"],
            policy_period_ms=float(document["policy_period_ms"]),
            state=state,
            action=action,
            client_image=document.get("client_image", "as_is"),
            source=self.source,
            **names,
        )

    def action(self, entry: dict[str, Any], where: Entry) -> ActionKey:
        common = self.key(entry, where)
        self.check_choice(entry.get("kind"), KINDS, where, "kind")
        key = ActionKey(
            **common,
            kind=entry["kind"],
            joints=tuple(entry.get("joints", ())),
            client_scale=entry.get("client_scale", 1.0),
            client_offset=entry.get("client_offset", 0.0),
        )
        if key.joints and len(key.joints) != key.size:
            self.refuse(f"{len(key.joints)} joints named for {key.size} numbers: name each one", where, "joints")
        has_limits = any(f.name in entry for f in fields(Limits))
        return replace(key, limits=self.limits(entry, key, where)) if has_limits else key

    def key(self, entry: dict[str, Any], where: Entry) -> dict[str, Any]:
        """The fields that state and action keys share."""
        assert where is not None
        known = STATE_FIELDS if where[0] == "state" else ACTION_FIELDS
        self.check_fields(entry, known, ("name", "slot"), where)
        start, stop = self.slot(entry["slot"], where)
        unit = entry.get("unit", "command")
        self.check_choice(unit, UNITS, where, "unit")
        if "normalisation" in entry:
            self.check_choice(entry["normalisation"], MODES, where, "normalisation")
        if "rotation" in entry:
            self.check_choice(entry["rotation"], ROTATION_SIZES, where, "rotation")
            if stop - start != ROTATION_SIZES[AXIS_ANGLE]:
                self.refuse(f"a rotation takes 3 numbers, not {stop - start}: give it a rotation slot", where, "slot")
        optional = {name: entry.get(name) for name in ("rotation", "normalisation")}
        return {"name": entry["name"], "start": start, "stop": stop, "unit": unit, **optional}

    def slot(self, text: str, where: Entry) -> tuple[int, int]:
        """A slot's range, or the part of it named by "slot[a:b]", as (start, stop) of the unified vector."""
        assert where is not None
        match = SLOT_RANGE.fullmatch(text)
        if match is None:
            self.refuse(f"'{text}' is no slot: write slot_name or slot_name[start:stop]", where, "slot")
        try:
            slot = find_slot(match["name"], where[0])
        except UnknownSlot as error:
            self.refuse(str(error), where, "slot")
        start = slot.start + int(match["start"] or 0)
        stop = slot.start + int(match["stop"]) if match["stop"] else slot.stop
        if stop > UNIFIED_DIM:
            self.refuse(f"'{text}' ends at {stop}, beyond the {UNIFIED_DIM} unified numbers: shorten it", where, "slot")
        if not slot.start <= start < stop <= slot.stop:
            self.refuse(f"'{text}' leaves its slot of {slot.size} numbers: stay within [0:{slot.size}]", where, "slot")
        return start, stop

    def limits(self, entry: dict[str, Any], key: ActionKey, where: Entry) -> Limits:
        unbounded = [float("inf")] * key.size
        values = {f.name: entry.get(f.name, unbounded) for f in fields(Limits)}
        for name, row in values.items():
            if len(row) != key.size or not all(isinstance(v, NUMBER) for v in row):
                self.refuse(f"'{name}' of '{key.name}' must be {key.size} numbers: give one each", where, name)
        if not all(low < high for low, high in zip(values["lower"], values["upper"], strict=True)):
            self.refuse(f"'lower' of '{key.name}' must be below 'upper': swap them", where, "lower")
        for name in ("velocity", "acceleration"):
            if not all(v > 0 for v in values[name]):
                self.refuse(f"'{name}' of '{key.name}' must be above 0: give the largest magnitude", where, name)
        return Limits(**{name: tuple(float(v) for v in row) for name, row in values.items()})

    def check_apart(self, side: Side, keys: Sequence[StateKey]) -> None:
        """Refuse two keys of one side that share a name or a unified number."""
        for i, key in enumerate(keys):
            for other in keys[:i]:
                if key.name == other.name:
                    self.refuse(f"two {side} keys are called '{key.name}': rename one", (side, i), "name")
                if key.start < other.stop and other.start < key.stop:
                    self.refuse(f"'{key.name}' overlaps '{other.name}' in the {side}: move one", (side, i), "slot")

    def check_fields(self, entry: Any, known: Mapping[str, Any], required: Sequence[str], where: Entry) -> None:
        """Refuse anything but a table with known fields of the right types and all the required ones."""
        if not isinstance(entry, dict):
            self.refuse("a table is needed here: write [[state]] or [[action]]", where, "")
        for name, value in entry.items():
            if name not in known:
                self.refuse(f"unknown field '{name}': {suggest(name, known)}", where, name)
            if not isinstance(value, known[name]):
                self.refuse(f"'{name}' is a {type(value).__name__}: give it as the other files do", where, name)
        for name in required:
            if name not in entry:
                self.refuse(f"'{name}' is missing: add it", where, "")

    def check_choice(self, value: Any, choices: Collection[str], where: Entry, name: str) -> None:
        if value not in choices:
            self.refuse(f"'{value}' is no {name}: {suggest(str(value), choices)}", where, name)

    def refuse(self, problem: str, where: Entry, name: str) -> NoReturn:
        raise EmbodimentError(f"{self.source}:{self.line_of(where, name)}: {problem}")

    def line_of(self, where: Entry, name: str) -> int:
        """The line (from 1) of a field, or of its table's header when the field is not there."""
        block = self.table_lines(where)
        field_at = re.compile(rf"\s*(\[+\s*)?{re.escape(name)}\s*[=\].]") if name else None
        return next((n for n in block if field_at and field_at.match(self.lines[n - 1])), block.start)

    def table_lines(self, where: Entry) -> range:
        """Line numbers of the n-th [[state]] or [[action]], header first; of the whole file for the top."""
        end = len(self.lines) + 1
        headers = [n for n, line in enumerate(self.lines, start=1) if HEADER.match(line)]
        side, index = where or ("", 0)
        own = [n for n in headers if self.lines[n - 1].split("#")[0].strip() == f"[[{side}]]"]
        if index >= len(own):
            return range(1, end)
        return range(own[index], next((n for n in headers if n > own[index]), end))
