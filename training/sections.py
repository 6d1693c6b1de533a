"""TOML tables read strictly into frozen dataclasses: unknown keys, wrong types and missing values are named."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from onbeat.embodiment.errors import OnbeatError

T = TypeVar("T")


class SectionError(OnbeatError):
    """A key that is unknown, missing or of another type. The text names file, section and key, and what to do."""


def read_section(kind: type[T], values: object, where: str) -> T:
    """A `kind` from a table. where: how errors call it, such as "a.toml: [fitting]". Raises SectionError.

    Fields may be int, float, bool, str, Literal, tuples of them, other dataclasses, tables of them by name, or any of
    these or None.
    """
    if not isinstance(values, Mapping):
        raise SectionError(f"{where} is {values!r}: give a table")
    fields, hints = dataclasses.fields(typing.cast(Any, kind)), typing.get_type_hints(kind)
    check_names(values, [field.name for field in fields], where)
    found = {name: _value(values[name], hints[name], name, where) for name in values}
    for field in fields:
        if field.name not in found and _is_required(field):
            raise SectionError(f"{where}: {field.name} is missing: give {_kind_name(hints[field.name])}")
    return kind(**found)


def check_names(values: Mapping[str, Any], known: list[str], where: str) -> None:
    """Raise SectionError for a key that is not known, with the closest that is."""
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            remedy = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(known)}"
            raise SectionError(f"{where}: unknown key '{name}': {remedy}")


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(value: object, kind: Any, name: str, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _value(value, arguments[0], name, where)
    if origin is typing.Literal:
        return _choice(value, arguments, name, where)
    if origin is tuple:
        return _items(value, arguments[0], name, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _table(value, arguments[1], name, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return read_section(kind, value, f"{where}.{name}")
    return _plain(value, kind, name, where)


def _plain(value: object, kind: type, name: str, where: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise SectionError(f"{where}: {name} is {value!r}: give {_kind_name(kind)}")
    return value


def _choice(value: object, known: tuple[Any, ...], name: str, where: str) -> Any:
    if value not in known:
        raise SectionError(f"{where}: {name} is {value!r}: give one of {', '.join(map(str, known))}")
    return value


def _items(value: object, kind: Any, name: str, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise SectionError(f"{where}: {name} is {value!r}: give a list")
    return tuple(_value(item, kind, f"{name}[{index}]", where) for index, item in enumerate(value))


def _table(value: object, kind: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise SectionError(f"{where}: {name} is {value!r}: give a table")
    return {key: _value(item, kind, key, f"{where}.{name}") for key, item in value.items()}


def _kind_name(kind: Any) -> str:
    return "a value" if typing.get_origin(kind) else f"a {kind.__name__}"
