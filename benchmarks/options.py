"""A question's options, a frozen dataclass, from the command line: nothing beyond the standard library is needed.

Each field is an option by its name with hyphens, helped by the docstring under it. Types: bool (`--x`, `--no-x`), int,
float, str, Path, Literal, `X | None` (the word None), and `tuple[X, ...]` (one word or more).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

Options = TypeVar("Options")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; `{self.prog} --help` lists the options")


def parse_options(of: type[Options], prog: str, arguments: Sequence[str]) -> Options:
    """The dataclass, filled from the words of a command line; --help prints and ends with status 0.

    Errors: ValueError naming the option.
    """
    parser = _Parser(
        prog=prog, description=inspect.getdoc(of), allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    helps, hints = _docstrings(of), get_type_hints(of)
    for field in dataclasses.fields(of):  # type: ignore[arg-type]
        name, required = field.name.replace("_", "-"), field.default is dataclasses.MISSING
        default = "required" if required else f"default: {_shown(field.default)}"
        text = textwrap.fill(f"{helps.get(field.name, '')} ({default})".strip(), 90)
        names = (f"--{name}", f"--no-{name}") if hints[field.name] is bool else (f"--{name}",)
        parser.add_argument(
            *names,
            dest=field.name,
            required=required,
            default=None if required else field.default,
            help=text.replace("%", "%%"),
            **_kind(hints[field.name]),
        )
    return of(**vars(parser.parse_args(arguments)))


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value) or "nothing"


def _docstrings(of: type) -> dict[str, str]:
    """The string that stands under each field, on one line."""
    found = {}
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(of))).body
    assert isinstance(body, ast.ClassDef)
    for field, below in pairwise(body.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def _kind(hint: Any) -> dict[str, Any]:
    """What argparse has to know of a type."""
    if hint is bool:
        return {"nargs": 0, "action": _Switch}
    if get_origin(hint) is tuple:
        item, *rest = get_args(hint)
        assert rest == [...], f"{hint}: only tuples of any length"
        return _kind(item) | {"nargs": "+", "action": _Tuple}
    return {"type": partial(_value, hint), "metavar": _written(hint)}


class _Switch(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not str(option_string).startswith("--no-"))


class _Tuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _value(hint: Any, word: str) -> Any:
    if (item := _without_none(hint)) is not None:
        return None if word == "None" else _value(item, word)
    if get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in get_args(hint)}
        if word not in choices:
            raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(choices)}")
        return choices[word]
    try:
        return hint(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is no {_written(hint)}") from None


def _written(hint: Any) -> str:
    """A type as --help has it."""
    if (item := _without_none(hint)) is not None:
        return f"{_written(item)}|None"
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    assert hint in (int, float, str, Path), f"{hint} is no option's type"
    return {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}[hint]


def _without_none(hint: Any) -> Any:
    """X of `X | None`; None of any other type."""
    if get_origin(hint) not in (Union, types.UnionType):
        return None
    (item,) = (part for part in get_args(hint) if part is not type(None))
    return item
