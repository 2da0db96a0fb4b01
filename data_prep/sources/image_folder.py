"""`<root>/<class>/.../<picture>`, on this machine or in an object store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources import Listing, ListingBuilder, Sample
from data_prep.sources.reading import check_suffix, file_stamp, read_ahead
from data_prep.storage import file_system, named_errors

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})


@dataclass(frozen=True)
class ImageFolder:
    """Classes and pictures in torchvision's order, so labels are torchvision's."""

    root: Path

    def describe(self) -> dict[str, Any]:
        return {"kind": "image-folder", "folder": "/".join(self.root.absolute().parts[-2:])}

    def where(self, path: str) -> str:
        return str(self.root / path)

    def scan(self) -> Listing:
        """Lists classes and pictures.

        Errors: FileNotFoundError or ValueError that names the folder or file and the mend, where the root is missing,
        holds no class folders, a class is empty, or a file is no picture by its name.
        """
        classes = self._classes()
        listing = ListingBuilder(classes)
        for label, name in enumerate(classes):
            paths = sorted(_pictures(self.root / name, name), key=os.path.split)
            if not paths:
                raise ValueError(f"class folder {self.root / name} holds no pictures: remove it, or fill it")
            for path in paths:
                listing.add(path, label)
        return listing.listing()

    def read(self, samples: Sequence[Sample]) -> Iterator[bytes]:
        for sample in samples:
            # Unbuffered: a buffer would be one more copy of each picture.
            with open(os.path.join(self.root, sample.path), "rb", buffering=0) as file:
                yield file.read()

    def stamp(self, sample: Sample) -> str:
        status = os.stat(os.path.join(self.root, sample.path))
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
        return tuple(classes)


def _pictures(folder: Path, name: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Pictures in and under `folder`, as paths under `name`; links are followed, hidden files are passed over."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{folder} is a link to a folder above it: remove it")
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _pictures(Path(entry.path), f"{name}/{entry.name}", (*above, here))
        elif not entry.is_file():
            raise ValueError(f"{entry.path} is no file (a broken link?): remove it")
        else:
            check_suffix(entry.name, entry.path)
            yield f"{name}/{entry.name}"


@dataclass(frozen=True)
class RemoteImageFolder:
    """The same in an object store: the same keys, labels and order as the local copy would have."""

    url: str

    def describe(self) -> dict[str, Any]:
        return {"kind": "image-folder", "folder": "/".join(self.url.split("://")[1].split("/")[-2:])}

    def where(self, path: str) -> str:
        return f"{self.url}/{path}"

    def scan(self) -> Listing:
        """As ImageFolder.scan; a store has no empty folders."""
        with named_errors(self.url):
            fs, root = file_system(self.url)
            found = [path[len(root) :].lstrip("/") for path in fs.find(root)]
        paths = sorted(path for path in found if not any(part.startswith(".") for part in path.split("/")))
        if not paths:
            raise FileNotFoundError(f"source {self.url} holds nothing: name a folder that holds one folder a class")
        for path in paths:
            if "/" not in path:
                raise ValueError(
                    f"{self.where(path)} lies beside the class folders, in none of them: move or remove it"
                )
            check_suffix(path, self.where(path))
        classes = sorted({path.split("/")[0] for path in paths})
        if SPLIT_NAMES.issuperset(name.lower() for name in classes):
            raise ValueError(f"source {self.url} holds splits, not classes: name {self.url}/{classes[0]}")
        labels = {name: label for label, name in enumerate(classes)}
        listing = ListingBuilder(classes)
        for path in sorted(paths, key=lambda path: (path.split("/")[0], *os.path.split(path))):
            listing.add(path, labels[path.split("/")[0]])
        return listing.listing()

    def read(self, samples: Sequence[Sample]) -> Iterator[bytes]:
        with named_errors(self.url):
            fs, root = file_system(self.url)
        return read_ahead(lambda sample: _read_object(fs, f"{root}/{sample.path}", self.where(sample.path)), samples)

    def stamp(self, sample: Sample) -> str:
        return file_stamp(self.where(sample.path))


def _read_object(fs: Any, path: str, where: str) -> bytes:
    with named_errors(where):
        return fs.cat_file(path)
