"""Where labelled pictures come from. A source lists its samples once, in one fixed order, and reads one when asked."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})
# A USTAR header holds 100 bytes of name; the longest suffix here is ".jpg".
MAX_KEY_LENGTH = 96


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled picture, its bytes not yet read."""

    key: str  # unique in its split; the name of its members in the shard
    path: str  # relative to the source's root: what messages call it
    label: int  # index into Listing.classes


@dataclass(frozen=True)
class Listing:
    """All that a source holds, in the source's own order."""

    classes: tuple[str, ...]
    samples: tuple[Sample, ...]

    def sha256(self) -> str:
        """Digest of paths and labels, in order: tells one source from another without reading the pictures."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(f"{sample.path}\0{sample.label}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageFolder:
    """``<root>/<class>/.../<picture>``; classes and pictures in torchvision's order, so labels are torchvision's."""

    root: Path

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the source: no absolute path, so that the same input gives the same bytes."""
        return {"kind": "image-folder", "folder": "/".join(self.root.absolute().parts[-2:])}

    def scan(self) -> Listing:
        """Lists classes and pictures.

        Errors: FileNotFoundError or ValueError that names the folder or file and the mend, where the root is missing,
        holds no class folders, a class is empty, or a file is no picture by its name.
        """
        classes = self._classes()
        seen: set[str] = set()
        samples = []
        for label, name in enumerate(classes):
            pictures = sorted(_pictures(self.root / name), key=lambda path: os.path.split(path))
            if not pictures:
                raise ValueError(f"class folder {self.root / name} holds no pictures: remove it, or fill it")
            for picture in pictures:
                path = os.path.relpath(picture, self.root)
                _check_name(path)
                samples.append(Sample(key=_unique_key(path, seen), path=path, label=label))
        return Listing(classes, tuple(samples))

    def read(self, sample: Sample) -> bytes:
        return (self.root / sample.path).read_bytes()

    def stamp(self, sample: Sample) -> str:
        """Changes when the picture's file changes, without reading it: tells whether a finished shard is still good."""
        status = os.stat(self.root / sample.path)
        return f"{status.st_size} {status.st_mtime_ns}"

    def _classes(self) -> tuple[str, ...]:
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            raise FileNotFoundError(f"source {self.root} {what}: name a folder that holds one folder a class")
        entries = [entry for entry in os.scandir(self.root) if not entry.name.startswith(".")]
        classes = sorted(entry.name for entry in entries if entry.is_dir())
        if classes and SPLIT_NAMES.issuperset(name.lower() for name in classes):
            raise ValueError(
                f"source {self.root} holds splits, not classes: name one of them, as in "
                f"--source {self.root / classes[0]}"
            )
        if not classes:
            raise ValueError(f"source {self.root} holds no class folders: it must be <source>/<class>/<picture>")
        if files := sorted(entry.name for entry in entries if not entry.is_dir()):
            raise ValueError(
                f"{self.root / files[0]} lies beside the class folders, in none of them: move or remove it"
            )
        for name in classes:
            _check_name(name)
        return tuple(classes)


def _pictures(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Pictures in and under `folder`, links followed; hidden files (.DS_Store and its like) are passed over."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{folder} is a link to a folder above it: remove it")
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _pictures(Path(entry.path), (*above, here))
        elif not entry.is_file():
            raise ValueError(f"{entry.path} is no file (a broken link?): remove it")
        elif not entry.name.lower().endswith(PICTURE_SUFFIXES):
            known = " ".join(PICTURE_SUFFIXES)
            raise ValueError(f"{entry.path} is no picture by its name (known: {known}): remove it, or rename it")
        else:
            yield entry.path


def _check_name(name: str) -> None:
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
    parent, name = os.path.split(path)
    stem = os.path.splitext(name)[0]
    whole = stem if stem.startswith(f"{parent}_") else f"{parent}/{stem}"
    key = base = re.sub(r"[^A-Za-z0-9_-]", "_", whole)
    if len(base) > MAX_KEY_LENGTH:
        key = base = f"{base[: MAX_KEY_LENGTH - 17]}_{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    number = 1
    while key in seen:
        number += 1
        key = f"{base[: MAX_KEY_LENGTH - 8]}_{number}"
    seen.add(key)
    return key
