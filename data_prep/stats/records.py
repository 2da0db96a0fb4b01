"""What is known of each picture of a shard: from the index, and from the first bytes of the picture itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from data_prep.images import PictureError, picture_size
from data_prep.index_records import index_records
from data_prep.jpeg import PROGRESSIVE_FRAME, Header, jpeg_header
from data_prep.keys import picture_keys
from data_prep.manifest import ShardRecord, check_index
from data_prep.storage import Folder, LocalFolder

# 46 bytes a picture: 61 MB for ImageNet's two splits.
RECORD = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),  # bytes
        ("label", "<i4"),
        ("crc32", "<u4"),
        ("width", "<u4"),  # pixels
        ("height", "<u4"),
        ("form", "u1"),  # index into FORMS
        ("progressive", "?"),
        ("digest", "<u8", (2,)),  # half of the sha256; 0 where the picture was not read whole
    ]
)
FORMS = ("4:2:0", "4:2:2", "4:4:4", "4:4:0", "4:1:1", "other subsampling", "grey", "four components", "no plain JPEG")
_SUBSAMPLING = {(2, 2): "4:2:0", (2, 1): "4:2:2", (1, 1): "4:4:4", (1, 2): "4:4:0", (4, 1): "4:1:1"}
# Of 250 ImageNet pictures' headers 228 end within the first, all within the second (EXIF with a preview, profiles).
_PREFIXES = (4 << 10, 80 << 10)
_AHEAD = 128  # pictures whose first bytes the disk is asked for at once


@dataclass(frozen=True)
class ShardJob:
    """A shard to read. It is sent to a process."""

    folder: Folder
    record: ShardRecord
    num_classes: int
    manifest: str  # what the user called it

    @property
    def where(self) -> str:
        return self.folder.where(self.record.name)

    @property
    def mend(self) -> str:
        return f"run `python -m data_prep verify {self.manifest}`"


class ShardPart(NamedTuple):
    """A shard's pictures."""

    records: np.ndarray  # (n,) of RECORD
    whole: bool  # whether every picture was read whole, and has its digest
    bytes_read: int


class DigestJob(NamedTuple):
    """Pictures of a shard that must be read whole."""

    shard: ShardJob
    records: np.ndarray  # (k,) of RECORD


class KeysJob(NamedTuple):
    """Pictures of a shard whose keys are asked for."""

    shard: ShardJob
    offsets: tuple[int, ...]


def read_shard(job: ShardJob) -> ShardPart:
    """Reads the index, and of each picture as much as its header takes.

    A picture is read whole where its index knows no CRC, and where the shard had to be fetched whole anyhow.
    Errors: ValueError or OSError naming the shard, the sample and the mend.
    """
    entries, crc_known = _read_index(job)
    records = np.zeros(len(entries), RECORD)
    for name in ("offset", "size", "label", "crc32"):
        records[name] = entries[name]
    whole = not crc_known or not isinstance(job.folder, LocalFolder)
    size = job.folder.size(job.record.name)
    if size is None:
        raise FileNotFoundError(f"{job.where} is missing: {job.mend}")
    if size != job.record.bytes:
        raise ValueError(f"{job.where} has {size:,} bytes, the manifest says {job.record.bytes:,}: {job.mend}")
    with job.folder.local(job.record.name) as path, open(path, "rb") as file:
        if whole:
            records["crc32"], records["digest"] = _hashes(job, file.fileno(), records, crc_known)
        measures, read = _measures(job, path, file.fileno(), list(_places(records)))
    for column, name in zip(zip(*measures, strict=True), ("width", "height", "form", "progressive"), strict=False):
        records[name] = column
    return ShardPart(records, whole, int(records["size"].sum(dtype=np.int64)) if whole else read)


def _measures(
    job: ShardJob, path: Path, descriptor: int, places: list[tuple[int, int]]
) -> tuple[list[tuple[int, int, int, bool]], int]:
    """((width, height, form, progressive) of each picture, bytes read)"""
    # Else the kernel reads 128 KB at each picture, which is all of the shard.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    measures, read = [], 0
    for number, (offset, size) in enumerate(places):
        if number % _AHEAD == 0:
            # The disk gets many requests at once: 105,000 pictures not in memory took 3.0 s for 9.3.
            for next_offset, next_size in places[number : number + _AHEAD]:
                os.posix_fadvise(descriptor, next_offset, min(_PREFIXES[0], next_size), os.POSIX_FADV_WILLNEED)
        try:
            measure, count = _measured(descriptor, offset, size)
        except PictureError as error:
            raise ValueError(f"{job.where}: {_name(path, number, offset)}: {error}: {job.mend}") from error
        measures.append(measure)
        read += count
    return measures, read


def _read_index(job: ShardJob) -> tuple[np.ndarray, bool]:
    """(the index's records, whether it knows CRCs)"""
    name, record = job.record.index_name, job.record
    where = job.folder.where(name)
    try:
        data = job.folder.read(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where} is missing: {job.mend}") from error
    if hashlib.sha256(data).hexdigest() != record.index_sha256:
        raise ValueError(f"{where} is not the index that the manifest records: {job.mend}")
    _, crc_known = check_index(data, Path(where))
    entries = index_records(data)
    labels = entries["label"]
    if len(entries) != record.samples or (labels < 0).any() or (labels >= job.num_classes).any():
        raise ValueError(f"{where} and the manifest differ in their samples or classes: {job.mend}")
    return entries, crc_known


def _name(tar: Path, number: int, offset: int) -> str:
    try:
        return f"sample {picture_keys(tar, [offset])[offset]}"
    except (ValueError, KeyError):
        return f"sample {number}, at byte {offset:,}"


def _measured(descriptor: int, offset: int, size: int) -> tuple[tuple[int, int, int, bool], int]:
    """((width, height, form, progressive), bytes read). Errors: PictureError."""
    count = 0
    for length in _PREFIXES:
        if length >= size:
            break
        data = os.pread(descriptor, length, offset)
        count += len(data)
        try:
            return _measure(data), count
        except PictureError:
            continue
    return _measure(os.pread(descriptor, size, offset)), count + size


def _measure(data: bytes) -> tuple[int, int, int, bool]:
    header = jpeg_header(data)
    if header is None or not header.width or not header.height:
        width, height = picture_size(data)
        if not width or not height:
            raise PictureError(f"its header declares {width}x{height}")
        return width, height, FORMS.index("no plain JPEG"), False
    return header.width, header.height, _form(header), header.frame == PROGRESSIVE_FRAME


def _form(header: Header) -> int:
    parts = header.components
    if len(parts) == 1:
        return FORMS.index("grey")
    if len(parts) == 4:
        return FORMS.index("four components")
    first, *others = ((part.horizontal, part.vertical) for part in parts)
    name = _SUBSAMPLING.get(first) if others == [(1, 1), (1, 1)] else None
    # Equal factors, whatever they are, mean that nothing is subsampled.
    name = "4:4:4" if others == [first, first] else name
    return FORMS.index(name or "other subsampling")


def read_digests(job: DigestJob) -> np.ndarray:
    """The pictures' digests, (k, 2). Errors: ValueError naming the shard and the mend."""
    with job.shard.folder.local(job.shard.record.name) as path, open(path, "rb") as file:
        return _hashes(job.shard, file.fileno(), job.records, True)[1]


def _hashes(job: ShardJob, descriptor: int, records: np.ndarray, crc_known: bool) -> tuple[np.ndarray, np.ndarray]:
    """(CRCs (n,), digests (n, 2)) of pictures read whole. Errors: ValueError where a CRC is not the index's."""
    crcs = np.zeros(len(records), np.uint32)
    digests = np.zeros((len(records), 2), np.uint64)
    for number, (offset, size) in enumerate(_places(records)):
        data = os.pread(descriptor, size, offset)
        crcs[number] = crc32(data)
        if len(data) != size or (crc_known and crcs[number] != records["crc32"][number]):
            raise ValueError(f"{job.where} is damaged: the picture at byte {offset:,} has another CRC: {job.mend}")
        digests[number] = np.frombuffer(hashlib.sha256(data).digest()[:16], "<u8")
    return crcs, digests


def _places(records: np.ndarray) -> Iterable[tuple[int, int]]:
    return zip(records["offset"].tolist(), records["size"].tolist(), strict=True)


def read_keys(job: KeysJob) -> list[str]:
    """The keys of the pictures at the offsets, in their order. Errors: ValueError naming the shard and the mend."""
    try:
        with job.shard.folder.local(job.shard.record.name) as path:
            keys = picture_keys(path, job.offsets)
    except ValueError as error:
        raise ValueError(f"{job.shard.where}: {error}: {job.shard.mend}") from error
    if missing := set(job.offsets) - keys.keys():
        raise ValueError(f"{job.shard.where} is damaged: nothing begins at byte {min(missing):,}: {job.shard.mend}")
    return [keys[offset] for offset in job.offsets]
