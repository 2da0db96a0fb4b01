"""One planned shard -> .tar and index: plain WebDataset layout, the same bytes for the same input anywhere."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from data_prep.manifest import IndexEntry, Manifest, ShardRecord, atomic_file, pack_index, unpack_index

INFO_NAME = "_info.json"  # where timm's WebDataset reader looks for splits
PICTURE_SUFFIX = ".jpg"
LABEL_SUFFIX = ".cls"


class Picture(Protocol):
    """What a shard needs of a sample."""

    @property
    def key(self) -> str: ...
    @property
    def label(self) -> int: ...


class _HashingTar:
    """Writes members one after another and knows where each one's bytes begin, which tarfile does not tell a writer."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.position = 0
        self.sha256 = hashlib.sha256()

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.position += len(data)

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its first byte."""
        info = tarfile.TarInfo(name)  # owner 0, time 0, mode 0644: nothing of the machine that writes
        info.size = len(data)
        self._write(info.tobuf(format=tarfile.USTAR_FORMAT))
        offset = self.position
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> None:
        # Two empty blocks end a tar; it is then filled to a whole record, as tar itself does.
        end = self.position + 2 * tarfile.BLOCKSIZE
        self._write(bytes(end - self.position + -end % tarfile.RECORDSIZE))


def write_tar(path: Path, pictures: Iterable[tuple[Picture, bytes]]) -> ShardRecord:
    """Writes `path` and the index beside it, each under a temporary name first.

    `pictures` yields (sample, JPEG bytes); where it raises, neither file appears.
    """
    entries: list[IndexEntry] = []
    with atomic_file(path) as file:
        tar = _HashingTar(file)
        for sample, data in pictures:
            offset = tar.add(sample.key + PICTURE_SUFFIX, data)
            tar.add(sample.key + LABEL_SUFFIX, b"%d" % sample.label)
            entries.append(IndexEntry(offset, len(data), sample.label, zlib.crc32(data)))
        tar.finish()
    index = pack_index(entries)
    with atomic_file(path.with_suffix(".idx")) as file:
        file.write(index)
    return ShardRecord(
        name=path.name,
        samples=len(entries),
        bytes=tar.position,
        sha256=tar.sha256.hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(folder: Path, record: ShardRecord) -> bool:
    """Whether tar and index lie there with the recorded bytes; reads both whole."""
    tar, index = folder / record.name, folder / record.index_name
    return (
        tar.is_file()
        and index.is_file()
        and tar.stat().st_size == record.bytes
        and file_sha256(index) == record.index_sha256
        and file_sha256(tar) == record.sha256
    )


def read_index(folder: Path, record: ShardRecord) -> list[IndexEntry]:
    """Errors: FileNotFoundError or ValueError, naming the index."""
    path = folder / record.index_name
    if not path.is_file():
        raise FileNotFoundError(f"index {path} is missing: make it again with `python -m data_prep shard`")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.index_sha256:
        raise ValueError(f"index {path} is not the one that the manifest records: run `python -m data_prep verify`")
    return unpack_index(data, path)


def read_pictures(tar: Path, entries: Iterable[IndexEntry]) -> Iterator[bytes]:
    """Yields each entry's bytes, checked against its CRC. Errors: ValueError naming the shard and the place in it."""
    with open(tar, "rb") as file:
        for entry in entries:
            file.seek(entry.offset)
            data = file.read(entry.size)
            if zlib.crc32(data) != entry.crc32:
                raise ValueError(
                    f"{tar} is damaged (the picture at byte {entry.offset} has another CRC): run "
                    "`python -m data_prep verify` for all of it, then `python -m data_prep shard` again"
                )
            yield data


def update_info(folder: Path, split: str, manifest: Manifest | None) -> None:
    """Writes the split's entry of timm's `_info.json`, or drops it (None); other splits' entries stay.

    Errors: ValueError where a file of that name is there and is something else.
    """
    path = folder / INFO_NAME
    lock = os.open(folder, os.O_RDONLY)
    try:
        # Two splits may be written at once into one folder: without the lock one entry could get lost.
        fcntl.flock(lock, fcntl.LOCK_EX)
        info = _read_info(path)
        info["splits"].pop(split, None)
        if manifest is not None:
            info["splits"][split] = timm_split(manifest)
        info["splits"] = dict(sorted(info["splits"].items()))
        with atomic_file(path) as file:
            file.write((json.dumps(info, indent=1) + "\n").encode())
    finally:
        os.close(lock)


def timm_split(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.split,
        "num_samples": manifest.num_samples,
        "filenames": [shard.name for shard in manifest.shards],
        "shard_lengths": [shard.samples for shard in manifest.shards],
    }


def _read_info(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"splits": {}}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and shard both splits again") from error
    if not isinstance(info, dict) or not isinstance(info.get("splits"), dict):
        raise ValueError(f"{path} does not list splits: remove it, and shard both splits again")
    return info
