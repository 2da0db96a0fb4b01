"""Where labelled pictures come from. A source lists its samples once, in one fixed order, and reads them when asked.

Every source names its pictures `<class>/<file>`, as an ImageFolder of the same data set would, and lists them class by
class and sorted: so the same pictures give the same shards, byte for byte, whatever they come from.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# A USTAR header holds 100 bytes of name; the longest suffix here is ".jpg".
MAX_KEY_LENGTH = 96
_LINES_AT_ONCE = 4096


class Sample(NamedTuple):
    """One labelled picture, its bytes not yet read."""

    key: str  # unique in its split; the name of its members in the shard
    path: str  # relative to the source's root: what messages call it
    label: int  # index into Listing.classes
    place: tuple[int, ...] = ()  # where the source finds it, in the source's own terms


@dataclass(frozen=True)
class Listing:
    """All that a source holds, in the source's own order. In columns: ImageNet's stays under 400 MB."""

    classes: tuple[str, ...]
    keys: list[str]
    paths: list[str]
    labels: np.ndarray  # int32 (n,)
    places: np.ndarray | None = None  # int64 (n, w)
    # Lengths of the runs of samples that are only read together (a Parquet file's row groups). None: any one alone.
    runs: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()  # readable, in the order of classes; empty where the source has none

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, index: int) -> Sample:
        place = () if self.places is None else tuple(self.places[index].tolist())
        return Sample(self.keys[index], self.paths[index], int(self.labels[index]), place)

    def sha256(self) -> str:
        """Digest of paths and labels, in order: tells one source from another without reading the pictures."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _LINES_AT_ONCE):
            part = slice(start, start + _LINES_AT_ONCE)
            pairs = zip(self.paths[part], self.labels[part].tolist(), strict=True)
            digest.update("".join(f"{path}\0{label}\n" for path, label in pairs).encode())
        return digest.hexdigest()


class Source(Protocol):
    """Labelled pictures. It is sent to worker processes, so it holds no open file."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the source: no absolute path, so that the same input gives the same bytes."""

    def where(self, path: str) -> str:
        """What messages call the picture at Sample.path."""

    def scan(self) -> Listing:
        """Lists classes and pictures. Errors: ValueError or OSError naming the file and the mend."""

    def read(self, samples: Sequence[Sample]) -> Iterator[bytes]:
        """The pictures' bytes, in the order of `samples`. Errors: OSError or ValueError naming the picture."""

    def stamp(self, sample: Sample) -> str:
        """Changes when the picture changes, without reading it: tells whether a finished shard is still good."""


class ListingBuilder:
    """Takes samples in the source's order and gives each its key."""

    def __init__(self, classes: Sequence[str], class_names: Sequence[str] = ()) -> None:
        for name in (*classes, *class_names):
            check_name(name)
        assert len(class_names) in (0, len(classes))
        self.classes = tuple(classes)
        self.class_names = tuple(class_names)
        self._seen: set[str] = set()
        self._keys: list[str] = []
        self._paths: list[str] = []
        # Lists of numbers would be 200 MB of ImageNet's.
        self._labels = array("i")
        self._places = array("q")

    def add(self, path: str, label: int, place: tuple[int, ...] = ()) -> None:
        """Errors: ValueError where the path cannot be a line of text."""
        check_name(path)
        self._keys.append(_unique_key(path, self._seen))
        self._paths.append(path)
        self._labels.append(label)
        self._places.extend(place)

    def listing(self, runs: Sequence[int] | None = None) -> Listing:
        places = np.array(self._places, np.int64).reshape(len(self._keys), -1) if self._places else None
        labels = np.array(self._labels, np.int32)
        lengths = None if runs is None else tuple(runs)
        return Listing(self.classes, self._keys, self._paths, labels, places, lengths, self.class_names)


def check_name(name: str) -> None:
    """Errors: ValueError for a name that is not UTF-8 or holds a line break."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"the name {os.fsencode(name)!r} is not UTF-8: rename it") from None
    if "\n" in name:
        raise ValueError(f"the name {name!r} holds a line break: rename it")


def _unique_key(path: str, seen: set[str]) -> str:
    """Key of the picture at `path`: its class and stem, so that a sample is traced back to its file by eye.

    ImageNet's `n01440764/n01440764_10026.JPEG` keeps its own stem, which names the class already. Dots and slashes
    cannot stay, for webdataset splits names at the first dot.
    """
    parent, _, name = path.rpartition("/")
    stem = os.path.splitext(name)[0]
    whole = stem if not parent or stem.startswith(f"{parent}_") else f"{parent}/{stem}"
    key = base = re.sub(r"[^A-Za-z0-9_-]", "_", whole)
    if len(base) > MAX_KEY_LENGTH:
        key = base = f"{base[: MAX_KEY_LENGTH - 17]}_{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    number = 1
    while key in seen:
        number += 1
        key = f"{base[: MAX_KEY_LENGTH - 8]}_{number}"
    seen.add(key)
    return key
