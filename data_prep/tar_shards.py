"""One planned shard -> .tar and index: plain WebDataset layout, the same bytes for the same input anywhere."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from isal.isal_zlib import crc32

from data_prep.background_write import BackgroundWriter
from data_prep.manifest import IndexEntry, Manifest, ShardRecord, pack_index, unpack_index
from data_prep.storage import Folder, LocalFolder

INFO_NAME = "_info.json"  # where timm's WebDataset reader looks for splits
PICTURE_SUFFIX = ".jpg"
LABEL_SUFFIX = ".cls"
_PADDING = bytes(tarfile.BLOCKSIZE)


class Picture(Protocol):
    """What a shard needs of a sample."""

    @property
    def key(self) -> str: ...
    @property
    def label(self) -> int: ...


def _header_template() -> tuple[bytes, bytes, bytes, int]:
    """What of a member's header does not change: after the name, after the size, after the checksum; and its sum.

    Owner 0, time 0, mode 0644: nothing of the machine that writes. tarfile takes 15 us for a header, of 100 us that a
    picture may take; spliced, it takes 2.
    """
    block = tarfile.TarInfo("").tobuf(format=tarfile.USTAR_FORMAT)
    before, middle, after = block[100:124], block[135:148], block[156:]
    # The sum is taken with blanks in the checksum's own field.
    return before, middle, after, sum(before) + sum(middle) + sum(after) + 8 * ord(" ")


_BEFORE_SIZE, _AFTER_SIZE, _AFTER_CHECKSUM, _FIXED_SUM = _header_template()
MAX_MEMBER_BYTES = 8**11 - 1


def member_header(name: bytes, size: int) -> bytes:
    """512 bytes, as tarfile writes them in USTAR format for TarInfo(name) of `size` bytes. A name has 100 at most."""
    assert len(name) <= 100 and size <= MAX_MEMBER_BYTES
    digits = b"%011o" % size
    checksum = _FIXED_SUM + sum(name) + sum(digits)
    return b"".join((name.ljust(100, b"\0"), _BEFORE_SIZE, digits, _AFTER_SIZE, b"%06o\0 " % checksum, _AFTER_CHECKSUM))


class _Tar:
    """Writes members one after another and knows where each one's bytes begin, which tarfile does not tell a writer."""

    def __init__(self, writer: BackgroundWriter) -> None:
        self.writer = writer
        self.position = 0

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its first byte."""
        self._append(member_header(name.encode(), len(data)))
        offset = self.position
        self._append(data)
        if padding := -len(data) % tarfile.BLOCKSIZE:
            self._append(_PADDING[:padding])
        return offset

    def finish(self) -> None:
        # Two empty blocks end a tar; it is then filled to a whole record, as tar itself does.
        end = self.position + 2 * tarfile.BLOCKSIZE
        self._append(bytes(end - self.position + -end % tarfile.RECORDSIZE))
        self.writer.finish()

    def _append(self, data: bytes) -> None:
        self.position += len(data)
        self.writer.append(data)


def write_tar(folder: Folder, name: str, pictures: Iterable[tuple[Picture, bytes]]) -> ShardRecord:
    """Writes a tar and the index beside it, each under a temporary name first.

    `pictures` yields (sample, JPEG bytes); where it raises, neither file appears.
    """
    entries: list[IndexEntry] = []
    # A store's shard is read again at once, to be sent: it stays in the page cache.
    direct = isinstance(folder, LocalFolder)
    with folder.file(name) as file, BackgroundWriter(file, direct) as writer:
        tar = _Tar(writer)
        for sample, data in pictures:
            offset = tar.add(sample.key + PICTURE_SUFFIX, data)
            tar.add(sample.key + LABEL_SUFFIX, b"%d" % sample.label)
            entries.append(IndexEntry(offset, len(data), sample.label, crc32(data)))
        tar.finish()
    index = pack_index(entries)
    record = ShardRecord(
        name=name,
        samples=len(entries),
        bytes=tar.position,
        sha256=writer.sha256.hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    with folder.file(record.index_name) as file:
        file.write(index)
    return record


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(folder: Folder, record: ShardRecord) -> bool:
    """Whether tar and index lie there with the recorded bytes.

    Reads both whole on this machine; of a store's tar, which appeared whole, the size alone is asked.
    """
    if folder.size(record.name) != record.bytes or folder.size(record.index_name) is None:
        return False
    if hashlib.sha256(folder.read(record.index_name)).hexdigest() != record.index_sha256:
        return False
    return not isinstance(folder, LocalFolder) or file_sha256(folder.path / record.name) == record.sha256


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
            if crc32(data) != entry.crc32:
                raise ValueError(
                    f"{tar} is damaged (the picture at byte {entry.offset} has another CRC): run "
                    "`python -m data_prep verify` for all of it, then `python -m data_prep shard` again"
                )
            yield data


def update_info(folder: Folder, split: str, manifest: Manifest | None) -> None:
    """Writes the split's entry of timm's `_info.json`, or drops it (None); other splits' entries stay.

    Errors: ValueError where a file of that name is there and is something else.
    """
    # Two splits may be written at once into one folder: without the lock one entry could get lost.
    with folder.locked():
        info = _read_info(folder)
        info["splits"].pop(split, None)
        if manifest is not None:
            info["splits"][split] = timm_split(manifest)
        info["splits"] = dict(sorted(info["splits"].items()))
        if not info["splits"]:
            folder.remove(INFO_NAME)
            return
        with folder.file(INFO_NAME) as file:
            file.write((json.dumps(info, indent=1) + "\n").encode())


def timm_split(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.split,
        "num_samples": manifest.num_samples,
        "filenames": [shard.name for shard in manifest.shards],
        "shard_lengths": [shard.samples for shard in manifest.shards],
    }


def _read_info(folder: Folder) -> dict[str, Any]:
    if folder.size(INFO_NAME) is None:
        return {"splits": {}}
    path = folder.where(INFO_NAME)
    try:
        info = json.loads(folder.read(INFO_NAME).decode())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and shard both splits again") from error
    if not isinstance(info, dict) or not isinstance(info.get("splits"), dict):
        raise ValueError(f"{path} does not list splits: remove it, and shard both splits again")
    return info
