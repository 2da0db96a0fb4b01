"""WebDataset tars as they are read: in place where they lie on this machine, else through the cache of their store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.manifest import Manifest
from pipeline.data.cache import ShardCache
from pipeline.data.index import IndexFile, SampleIndex
from pipeline.data.source import OpenFile, OpenFiles

_HEADER_BYTES, _NAME_BYTES = 512, 100  # of a tar's member; its name, cut at the first NUL


class TarSource:
    """One split's tars. Safe to fork: files are read by offset, and opened where they are first needed."""

    def __init__(self, manifest: Manifest, folder: str, cache: ShardCache | None) -> None:
        """folder: where manifest and tars lie, a path or a URL. cache: in front of it, where it is a URL.

        Errors: ValueError, FileNotFoundError naming the file that is not what the manifest says.
        """
        self.folder = folder
        self.shards = manifest.shards
        self.cache = cache
        self.fetches = cache is not None
        verify = f"run `python -m data_prep verify {folder}/{manifest.path.name}`"
        self._verify = f"{verify} and write this shard again"
        if cache is None:
            self._check_files(verify)
        self.index = SampleIndex(
            [
                IndexFile(
                    cache.index(shard.name) if cache is not None else Path(folder, shard.index_name),
                    shard.samples,
                    shard.index_sha256,
                    verify,
                )
                for shard in manifest.shards
            ]
        )
        self._files = OpenFiles(self._open)

    def file(self, number: int, wait: bool = True) -> OpenFile:
        return self._files.get(number, wait)

    def where(self, sample_id: int) -> str:
        number, place = self.index.place(sample_id)
        return f"sample {sample_id} ({self.folder}/{self.shards[number].name}, picture {place})"

    def member_names(self) -> Iterator[str]:
        """What each picture is called in its tar, in the manifest's order: the index has no names.

        From the header in front of it, whose first 100 bytes are all that a plain one has for a name. One tar is open
        at a time: a cache may have room for no more.
        """
        self.expect(np.arange(len(self.shards)), keep=False)
        for number in range(len(self.shards)):
            file = self.file(number)
            for offset in self.index.of_file(number)["offset"].tolist():
                header = os.pread(file.descriptor, _NAME_BYTES, offset - _HEADER_BYTES)
                yield header.partition(b"\0")[0].decode("utf-8", "replace")
            del file
        self.expect(np.empty(0, np.int64), keep=False)

    def form(self, sample_ids: np.ndarray) -> None:
        return None

    def mend(self, number: int) -> str:
        if self.cache is None:
            return self._verify
        return f"remove {self.cache.place(self.shards[number].name)}, so that it is fetched again; else {self._verify}"

    def check_sizes(self) -> None:
        if self.cache is not None:
            self.cache.check_sizes()

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()

    def expect(self, files: np.ndarray, keep: bool) -> None:
        if self.cache is not None:
            self._files.keep(frozenset(files.tolist() if keep else ()))
            self.cache.plan([self.shards[number].name for number in files.tolist()])

    def _open(self, number: int, wait: bool) -> int:
        name = self.shards[number].name
        return self.cache.open(name, wait) if self.cache is not None else os.open(Path(self.folder, name), os.O_RDONLY)

    def _check_files(self, mend: str) -> None:
        """Errors: FileNotFoundError, ValueError for a tar that is not there, or of another size."""
        for shard in self.shards:
            tar = Path(self.folder, shard.name)
            if not tar.is_file():
                raise FileNotFoundError(f"{tar} is missing, but the manifest names it: {mend}")
            if (size := tar.stat().st_size) != shard.bytes:
                raise ValueError(f"{tar} has {size} bytes, the manifest says {shard.bytes}: {mend}")
