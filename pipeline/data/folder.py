"""Pictures as files in folders, one folder a class: a data set as it was unpacked, read without making shards of it.

Every picture is a file of its own, so no index with checksums stands beside them. What is looked at instead: a file's
size when it is listed, and again when it is opened. Damage that leaves the size is seen only where a picture cannot be
decoded any more; `samples_sha256` tells of names, sizes and labels, not of the bytes.

Pixels are those of the files. A shard holds the same, but for what data_prep encodes anew (PNG, CMYK and the like).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.data.augment import AugmentConfig
from pipeline.data.index import RECORD, checked_ids
from pipeline.data.loader import DataConfig
from pipeline.data.reader import Labels, PictureReader, Reading
from pipeline.data.source import OpenFile, OpenFiles, WrongBytes, allow_open_files

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")  # what decode.py reads, whatever of these it is called
_MOST_BYTES = (1 << 32) - 1  # of a record's size


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the visible folders in `root`, sorted as text. Links are followed; a README beside them is passed over.

    Errors: OSError or ValueError naming the path and the mend, where it is no folder, or holds pictures itself.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"{root} {what}: name the folder that holds one folder a class")
    names = []
    for entry in os.scandir(root):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            names.append(entry.name)
        elif entry.name.lower().endswith(SUFFIXES):
            raise ValueError(f"{entry.path} lies in no class's folder: name the folder that holds one folder a class")
    return tuple(sorted(names))


def pictures_in(folder: Path) -> list[str]:
    """Names of a class's pictures, sorted as text. Hidden files are passed over, links followed.

    Errors: OSError or ValueError naming the file and the mend: a folder, a broken link, no picture by its name, none.
    """
    names = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            raise ValueError(f"{entry.path} is a folder inside a class's: a class holds its pictures alone; move it")
        if not entry.is_file():
            raise ValueError(f"{entry.path} is no file (a broken link?): unpack the set again, or remove it")
        if not entry.name.lower().endswith(SUFFIXES):
            raise ValueError(f"{entry.path} is no picture by its name ({', '.join(SUFFIXES)}): remove it")
        names.append(entry.name)
    if not names:
        raise ValueError(f"class folder {folder} holds no pictures: unpack the set again")
    return sorted(names)


class FolderIndex:
    """Each file holds one sample: file i is sample i."""

    def __init__(self, sizes: np.ndarray, labels: np.ndarray) -> None:
        """sizes: in bytes, labels: both (n,)."""
        self._records = np.zeros(len(sizes), RECORD)
        self._records["size"] = sizes
        self._records["label"] = labels

    def __len__(self) -> int:
        return len(self._records)

    def files_of(self, sample_ids: np.ndarray) -> np.ndarray:
        return np.asarray(sample_ids, np.int64)

    def records(self, sample_ids: np.ndarray) -> np.ndarray:
        return self._records[checked_ids(sample_ids, len(self))]

    def place(self, sample_id: int) -> tuple[int, int]:
        return sample_id, 0

    def labels(self) -> np.ndarray:
        return self._records["label"].copy()


class FolderSource:
    """The pictures of `<root>/<folder>/<name>`, class by class and sorted by name. Safe to fork.

    Names are held, 0.1 KB each; a file is open only while its batch is read.
    """

    fetches = False

    def __init__(self, root: Path, folders: Sequence[str]) -> None:
        """folders: of the classes, in the order of the labels. Errors: as pictures_in, and for a file that is empty."""
        self.root = root
        self.folders = tuple(folders)
        by_class = [pictures_in(root / folder) for folder in self.folders]
        self._names = [name for names in by_class for name in names]
        labels = np.repeat(np.arange(len(by_class)), [len(names) for names in by_class])
        self._labels = labels.tolist()
        self._files = OpenFiles(self._open)
        self._files.keep(frozenset())  # each is read once
        self.index = FolderIndex(np.fromiter(map(self._size, range(len(labels))), np.int64, len(labels)), labels)

    def path(self, sample_id: int) -> Path:
        return self.root / self.folders[self._labels[sample_id]] / self._names[sample_id]

    def file(self, number: int, wait: bool = True) -> OpenFile:
        """Errors: WrongBytes where its size has changed since it was listed."""
        file = self._files.get(number)
        listed = int(self.index.records(np.array([number]))["size"][0])
        if (size := os.fstat(file.descriptor).st_size) != listed:
            raise WrongBytes(
                f"{self.where(number)} has {size} bytes, and had {listed} when listed: {self.mend(number)}"
            )
        return file

    def where(self, sample_id: int) -> str:
        return f"sample {sample_id} ({self.path(sample_id)})"

    def form(self, sample_ids: np.ndarray) -> None:
        return None

    def mend(self, number: int) -> str:
        return "unpack the set again, and leave it alone while it is read"

    def expect(self, files: np.ndarray, keep: bool) -> None:
        """Nothing is kept for later."""

    def check_sizes(self) -> None:
        """Done when it was opened."""

    def close(self) -> None:
        """Nothing runs for it."""

    def samples_sha256(self) -> str:
        """Of names, sizes and labels, in order."""
        digest = hashlib.sha256()
        for name in self.folders:
            digest.update(os.fsencode(name) + b"\0")
        for name in self._names:
            digest.update(os.fsencode(name) + b"\0")
        records = self.index.records(np.arange(len(self.index)))
        digest.update(records["size"].tobytes() + records["label"].tobytes())
        return digest.hexdigest()

    def _open(self, number: int, wait: bool) -> int:
        return os.open(self.path(number), os.O_RDONLY)

    def _size(self, number: int) -> int:
        path = self.path(number)
        size = path.stat().st_size
        if not 0 < size <= _MOST_BYTES:
            raise ValueError(f"{path} has {size:,} bytes, which is no picture: {self.mend(number)}")
        return size


def open_folder(
    root: Path, folders: Sequence[str], classes: Sequence[str], config: DataConfig, augment: AugmentConfig, seed: int
) -> PictureReader:
    """A split of class folders. folders, classes: names on disk and of the classes, both in the order of the labels.

    Errors: as FolderSource.
    """
    source = FolderSource(root, folders)
    labels = Labels(tuple(classes), np.arange(len(classes)))
    # There are no checksums.
    reading = Reading(config.image_size, augment, seed, max(1, config.workers), config.on_bad_sample, check_crc=False)
    allow_open_files()
    return PictureReader(source, labels, (), source.samples_sha256(), reading)


def names_sha256(root: Path, folders: Sequence[str]) -> tuple[int, str]:
    """(how many, a digest of folders and names) of the pictures that FolderSource would list: no file is looked at."""
    digest, count = hashlib.sha256(), 0
    for line in _lines(root, folders):
        digest.update(line)
        count += 1
    return count, digest.hexdigest()


def _lines(root: Path, folders: Sequence[str]) -> Iterator[bytes]:
    for folder in folders:
        for name in pictures_in(root / folder):
            yield os.fsencode(f"{folder}/{name}") + b"\0"
