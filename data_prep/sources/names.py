"""Lists of class names that a user gives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.storage import open_file


def read_classes(url: str) -> tuple[str, ...]:
    """Class names, one a line, in the order of the labels.

    Errors: FileNotFoundError, or ValueError naming the file and the line.
    """
    lines = _text(url).splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            raise ValueError(f"{url}, line {number} is empty: give one class name a line, in the order of the labels")
        if name in seen:
            raise ValueError(f"{url}, line {number} names {name!r}, as line {seen[name]} does: name each class once")
        seen[name] = number
    if not seen:
        raise ValueError(f"{url} is empty: give one class name a line, in the order of the labels")
    return tuple(seen)


def read_class_names(url: str, classes: Sequence[str]) -> tuple[str, ...]:
    """A readable name for each class, in the order of `classes`; the file may name more.

    It holds lines `<class> <name>` (Kaggle's LOC_synset_mapping.txt), or JSON: {class: name}, or
    {label: [class, name]} (Keras's imagenet_class_index.json).
    Errors: FileNotFoundError, or ValueError naming the file, and the class that has no name or two.
    """
    text = _text(url)
    pairs = _json_pairs(text, url) if text.lstrip().startswith("{") else _line_pairs(text, url)
    wanted = set(classes)
    names: dict[str, str] = {}
    for name, readable in pairs:
        if name in names and name in wanted:
            raise ValueError(f"{url} names class {name!r} twice ({names[name]!r}, {readable!r}): keep one")
        if not readable or "\n" in readable:
            raise ValueError(f"{url}: the name of class {name!r} is {readable!r}: it must be one line of text")
        names[name] = readable
    for name in classes:
        if name not in names:
            missing = sum(name not in names for name in classes)
            raise ValueError(
                f"{url} has no name for class {name!r} ({missing:,} of {len(classes):,} classes have none): add it"
            )
    return tuple(names[name] for name in classes)


def _text(url: str) -> str:
    folder, name = open_file(url)
    try:
        return folder.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is not UTF-8 text ({error}): name a file of class names") from error


def _line_pairs(text: str, url: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, *rest = line.split(maxsplit=1)
        if not rest:
            raise ValueError(f"{url}, line {number} is {line.strip()!r}: each line must be `<class> <name>`")
        yield name, rest[0].strip()


def _json_pairs(text: str, url: str) -> Iterator[tuple[str, str]]:
    try:
        # As pairs: a dict would keep the last of two equal keys, and say nothing.
        pairs = json.loads(text, object_pairs_hook=list)
    except ValueError as error:
        raise ValueError(f"{url} begins as JSON but cannot be read ({error}): mend it") from error
    for key, value in pairs:
        yield _json_pair(key, value, url)


def _json_pair(key: str, value: Any, url: str) -> tuple[str, str]:
    if isinstance(value, str):
        return key, value
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return value[0], value[1]
    raise ValueError(f"{url}: {key!r} has {value!r}: it must be a name, or [class, name]")
