"""The files in an archive that is read in place, on this machine or in a store: names and places."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import IO

from data_prep.storage import file_system, local_path, named_errors
from data_prep.tar_headers import Member, members_in


def walk_archive(url: str, inside: Member | None = None) -> Iterator[Member]:
    """The files in the tar, or in the tar that is its member `inside`, in the tar's order. Folders are passed over.

    Errors: FileNotFoundError; ValueError as tar_headers.members_in.
    """
    where = f"{url}: {inside.name}" if inside else url
    with _opened(url) as file:
        size = file.seek(0, os.SEEK_END)
        start, end = (inside.offset, inside.offset + inside.size) if inside else (0, size)
        if start == end:
            raise ValueError(f"{where} is empty: fetch it again")
        if local_path(url) is None:
            yield from members_in(_Ranges(file), start, end, where)
            return
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            yield from members_in(data, start, end, where)


def _opened(url: str) -> IO[bytes]:
    path = local_path(url)
    try:
        if path is not None:
            return open(path, "rb")
        with named_errors(url):
            fs, remote = file_system(url)
            return fs.open(remote, "rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"source {url} does not exist: name the archive as it was fetched") from error


class _Ranges:
    """A store's object, of which slices are read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __getitem__(self, part: slice, /) -> bytes:
        self._file.seek(part.start)
        return self._file.read(part.stop - part.start)
