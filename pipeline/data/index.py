"""Where each sample lies: the shards' index files, mapped into memory and found by sample id.

A mapping is of the page cache, which all ranks of a machine share: 512 ranks' worth of readers hold one copy. Private
to a process are some hundred bytes a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.manifest import INDEX_HEADER, INDEX_TRAILER, check_index

RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("crc32", "<u4")])


class IndexFile(NamedTuple):
    """One index, and what the manifest says of it."""

    path: Path
    samples: int
    sha256: str
    mend: str  # what to do where it is not so


class SampleIndex:
    """The records of all samples, in the manifest's order. Sample ids run on from file to file."""

    def __init__(self, files: Sequence[IndexFile]) -> None:
        """Reads every file once, to check it. Errors: as mapped_records."""
        self.sizes = np.array([file.samples for file in files], np.int64)
        self._first_ids = np.cumsum(self.sizes) - self.sizes
        self._records = [mapped_records(file) for file in files]

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def files_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """Which file holds each sample, int64 (B,)."""
        return np.searchsorted(self._first_ids, sample_ids, side="right") - 1

    def records(self, sample_ids: np.ndarray) -> np.ndarray:
        """The records of some samples, RECORD (B,), copied. Errors: IndexError for an id that there is not."""
        sample_ids = checked_ids(sample_ids, len(self))
        found = np.empty(len(sample_ids), RECORD)
        files = self.files_of(sample_ids)
        places = sample_ids - self._first_ids[files]
        for i, (file, place) in enumerate(zip(files.tolist(), places.tolist(), strict=True)):
            found[i] = self._records[file][place]
        return found

    def place(self, sample_id: int) -> tuple[int, int]:
        """(file, place in it)."""
        file = int(self.files_of(np.array([sample_id]))[0])
        return file, int(sample_id - self._first_ids[file])

    def of_file(self, number: int) -> np.ndarray:
        """The records of one file, RECORD, mapped and read-only."""
        return self._records[number]

    def labels(self) -> np.ndarray:
        """All labels as the shards have them, int32 (n,); a copy of its own at each call."""
        return np.concatenate([np.empty(0, "<i4"), *(records["label"] for records in self._records)])


def checked_ids(sample_ids: np.ndarray, count: int) -> np.ndarray:
    """int64. Errors: IndexError for an id that is not one of `count`."""
    sample_ids = np.asarray(sample_ids, np.int64)
    if len(sample_ids) and not 0 <= sample_ids.min() <= sample_ids.max() < count:
        raise IndexError(f"sample ids {sample_ids.min()} to {sample_ids.max()}: there are {count} samples")
    return sample_ids


def mapped_records(file: IndexFile) -> np.ndarray:
    """A file's records, read-only.

    Errors: FileNotFoundError or ValueError where the index is not what the manifest says.
    """
    if not file.path.is_file():
        raise FileNotFoundError(f"{file.path} is missing: {file.mend}")
    size = file.path.stat().st_size
    # torch closes the file after mapping it; numpy and mmap keep a descriptor each, and there may be but 1,024.
    mapped = torch.from_file(str(file.path), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0)
    data = mapped.numpy().data
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise ValueError(f"{file.path} is not the index that the manifest tells of: {file.mend}")
    count, crc_known = check_index(data, file.path)
    if count != file.samples:
        raise ValueError(f"{file.path} has {count} samples, the manifest says {file.samples}: {file.mend}")
    if not crc_known:
        raise ValueError(
            f"{file.path} holds no CRCs (a foreign tar's): add them with `python -m data_prep index --hash`"
        )
    records = np.frombuffer(data, RECORD, count, INDEX_HEADER.size)
    assert INDEX_HEADER.size + records.nbytes + INDEX_TRAILER.size == size
    records.flags.writeable = False
    return records
