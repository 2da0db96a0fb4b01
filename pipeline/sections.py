"""Frozen dataclasses of options <-> JSON, so that a run's resolved configuration can be read back exactly."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(section: Any) -> Any:
    """A section, or a value in one, as JSON types."""
    if dataclasses.is_dataclass(section):
        return {f.name: to_json(getattr(section, f.name)) for f in dataclasses.fields(section)}
    if isinstance(section, Path):
        return str(section)
    if isinstance(section, tuple | list):
        return [to_json(value) for value in section]
    if isinstance(section, dict):
        return {key: to_json(value) for key, value in section.items()}
    return section


def from_json(cls: type[T], body: dict[str, Any], where: str) -> T:
    """The section again. Errors: ValueError naming `where` and the option, for one that is missing or unknown."""
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := body.keys() - names:
        raise ValueError(f"{where} has options that this version does not know: {', '.join(sorted(unknown))}")
    if missing := names - body.keys():
        raise ValueError(f"{where} lacks options that this version needs: {', '.join(sorted(missing))}")
    return cls(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in body.items()})


def _choices(option: Any) -> tuple[Any, ...]:
    return typing.get_args(option) if typing.get_origin(option) is typing.Literal else ()


def _value(hint: Any, value: Any, where: str) -> Any:
    if value is None:
        return None
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    literals = [choice for option in options for choice in _choices(option)]
    others = tuple(option for option in options if isinstance(option, type))  # of `int | Literal["auto"]`
    if literals and value not in literals and not isinstance(value, others):
        raise ValueError(f"{where} is {value!r}: use one of {', '.join(map(str, literals))}")
    for option in options:
        if dataclasses.is_dataclass(option):
            return from_json(typing.cast(type, option), value, where)
        if option is Path:
            return Path(value)
        if typing.get_origin(option) is tuple:
            return tuple(_value(typing.get_args(option)[0], item, where) for item in value)
    return value
