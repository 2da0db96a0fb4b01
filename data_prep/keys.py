"""Names as people see them: the keys of a tar's pictures, which its index does not hold, and text made harmless."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from data_prep.tar_headers import read_members


def picture_keys(tar: Path, offsets: Iterable[int]) -> dict[int, str]:
    """Offset of a picture's first byte -> its sample's key, for those of `offsets` at which a member begins.

    Errors: ValueError naming the tar where a header is damaged.
    """
    wanted = set(offsets)
    return {member.offset: _key(member.name) for member in read_members(tar) if member.offset in wanted}


def _key(name: str) -> str:
    """The name up to the first dot of its last part, as the webdataset library splits it."""
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    return name if dot <= base else name[:dot]


def printable(text: str) -> str:
    """The text with a mark in place of control characters, which a terminal would take for commands."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
