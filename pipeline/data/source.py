"""Where the bytes of a split's pictures are: what tars, .betons and folders share, and files that stay open."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from isal.isal_zlib import crc32

_MOST_OPEN_FILES = 4096


class Form(NamedTuple):
    """What a container says of its pictures beside their bytes."""

    sizes: np.ndarray  # uint32 (B, 2): width and height
    raw: np.ndarray  # bool (B,): RGB pixels, row by row; else a JPEG


class Index(Protocol):
    """Where each sample lies, by its id."""

    def __len__(self) -> int:
        """Samples."""
        ...

    def files_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """Which file holds each sample, int64 (B,)."""
        ...

    def records(self, sample_ids: np.ndarray) -> np.ndarray:
        """index.RECORD (B,), copied. Errors: IndexError for an id that there is not."""
        ...

    def place(self, sample_id: int) -> tuple[int, int]:
        """(file, place in it)."""
        ...

    def labels(self) -> np.ndarray:
        """All labels as the container has them, int32 (n,); a copy of its own at each call."""
        ...


class Source(Protocol):
    """The pictures of a split, as bytes in files."""

    fetches: bool  # whether its files come from a store

    @property
    def index(self) -> Index: ...

    def file(self, number: int, wait: bool = True) -> OpenFile:
        """One of the index's files, open for reading.

        wait: for room, where it comes through a cache whose files are all in use. Errors: NoRoom where it may not.
        """
        ...

    def where(self, sample_id: int) -> str:
        """What messages call a sample: its id, its file and its place in it."""
        ...

    def form(self, sample_ids: np.ndarray) -> Form | None:
        """What the samples' bytes are; None: all are encoded, and nothing else is known."""
        ...

    def mend(self, number: int) -> str:
        """What to do where a file does not hold what the index says."""
        ...

    def expect(self, files: np.ndarray, keep: bool) -> None:
        """Says which files are needed from now on, in that order.

        keep: they stay open once they are, so that no cache drops them. All others are closed.
        """
        ...

    def check_sizes(self) -> None:
        """Looks at the size of every file; a store's would else be looked at when they are needed.

        Errors: OSError naming the file that is not there, or has another size.
        """
        ...

    def close(self) -> None:
        """Ends what runs for it; it can be used again."""
        ...


def allow_open_files() -> None:
    """As many as the system lets a process have: ImageNet has more shards than the usual 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class OpenFile:
    """A descriptor, closed with the last who uses it: a batch that is being read outlives its place among the open."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class NoRoom(Exception):
    """A file would have to wait until others are closed."""


class OpenFiles:
    """The files used last, by number. Threads may share it."""

    def __init__(self, open_file: Callable[[int, bool], int]) -> None:
        """open_file: gives a descriptor of a number's file; where it may not wait for room, it raises NoRoom."""
        self._open = open_file
        # Half of what the process may have: opening anew is a request to the server of a network file system.
        self._most = min(_MOST_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self._wanted: frozenset[int] | None = None  # None: any
        self._lock = threading.Lock()

    def get(self, number: int, wait: bool = True) -> OpenFile:
        with self._lock:
            if number in self._files:
                self._files.move_to_end(number)
                return self._files[number]
        try:
            file = OpenFile(self._open(number, wait))  # may wait for a store: others go on
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            reason = (
                "this process may open no more files: raise `ulimit -n`, or read fewer at once (micro_batch, batch)"
            )
            raise OSError(error.errno, reason, error.filename) from error
        with self._lock:
            if self._wanted is None or number in self._wanted:  # else of a batch that was begun before keep()
                self._files[number] = file
            if len(self._files) > self._most:
                self._files.popitem(last=False)
        return file

    def keep(self, numbers: frozenset[int]) -> None:
        """Lets all others go, now and later."""
        with self._lock:
            self._wanted = numbers
            for number in self._files.keys() - numbers:
                del self._files[number]


class WrongBytes(ValueError):
    """A file does not hold what its index says."""


def checked_bytes(source: Source, sample_id: int, check_crc: bool = True) -> bytes:
    """A sample's bytes as they stand in its file.

    Errors: WrongBytes naming file and sample where they are not those that the index tells of; OSError where the file
    itself cannot be had.
    """
    record = source.index.records(np.array([sample_id]))[0]
    number = source.index.place(sample_id)[0]
    file = source.file(number)
    try:
        data = os.pread(file.descriptor, int(record["size"]), int(record["offset"]))
    except OSError as error:  # a bad sector: of this sample, not of the file
        raise WrongBytes(f"{source.where(sample_id)}: cannot be read ({error}); {source.mend(number)}") from error
    if len(data) != record["size"] or (check_crc and crc32(data) != record["crc32"]):
        raise WrongBytes(
            f"{source.where(sample_id)}: the bytes are not those that were written (CRC differs); {source.mend(number)}"
        )
    return data
