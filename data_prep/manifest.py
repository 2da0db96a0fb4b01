"""Manifest and shard index: the contract between ``data_prep``, which writes, and ``pipeline.data``, which reads.

Standard library only, so that both sides can import it without pulling in the other's dependencies.

A *split* (train, val) is described by ``<split>.manifest.json``. The order of its shards, and of the samples inside
each, defines the **sample id**: 0 to n-1, for ever. A .beton holds the same samples in the same order.

Index file (``<shard>.idx``), little endian: 8 bytes magic, ``u64`` count, ``u32`` flags, then one 20-byte record a
sample (``u64`` offset, ``u32`` size, ``i32`` label, ``u32`` CRC-32 of the picture's bytes), then the CRC-32 of all
that came before. Fixed-size records let a reader map the file and find sample i without parsing the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
import struct
import typing
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

MANIFEST_FORMAT = "noisynn-manifest"
MANIFEST_VERSION = 1
MANIFEST_SUFFIX = ".manifest.json"

Record = TypeVar("Record")

INDEX_MAGIC = b"NNINDEX1"
INDEX_HEADER = struct.Struct("<8sQI")
INDEX_RECORD = struct.Struct("<QIiI")
INDEX_TRAILER = struct.Struct("<I")
FLAG_CRC_KNOWN = 1


class IndexEntry(NamedTuple):
    """Where one picture lies in its shard, and what it must be."""

    offset: int  # bytes from the start of the tar to the picture's first byte
    size: int  # bytes
    label: int  # index into Manifest.classes
    crc32: int  # of the picture's bytes; 0 where the index says that CRCs are unknown


@dataclass(frozen=True)
class ShardRecord:
    """One WebDataset tar and its index; names are relative to the manifest's folder."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        return str(Path(self.name).with_suffix(".idx"))


@dataclass(frozen=True)
class BetonRecord:
    """One FFCV file that holds the manifest's samples in the manifest's order."""

    name: str
    samples: int
    bytes: int
    sha256: str
    mode: str  # "raw", "jpg" or "proportion"
    max_resolution: int | None  # longest side in pixels, None where the originals were kept
    jpeg_quality: int | None


@dataclass(frozen=True)
class Note:
    """A sample that was repaired or skipped, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """All that a reader must know of one split. It holds no times and no process counts: same input, same bytes."""

    split: str
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    shards: tuple[ShardRecord, ...]
    source: dict[str, Any]
    options: dict[str, Any]
    repaired: tuple[Note, ...] = ()
    skipped: tuple[Note, ...] = ()
    beton: BetonRecord | None = None
    folder: Path = field(default=Path(), compare=False)  # where it was read from; not written

    @property
    def num_samples(self) -> int:
        return sum(self.class_counts)

    @property
    def path(self) -> Path:
        return manifest_path(self.folder, self.split)

    def samples_sha256(self) -> str:
        """Digest of the samples and their order: a .beton written later, or another folder, does not change it."""
        digest = hashlib.sha256()
        for text in (*self.classes, *(shard.sha256 for shard in self.shards)):
            digest.update(f"{text}\0".encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        body = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, "num_samples": self.num_samples}
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k != "folder"}
        return json.dumps(body | fields, indent=1, ensure_ascii=False) + "\n"


def manifest_path(folder: Path, split: str) -> Path:
    return folder / f"{split}{MANIFEST_SUFFIX}"


def write_manifest(manifest: Manifest) -> Path:
    """Writes the manifest into its folder under a temporary name, then renames it."""
    with atomic_file(manifest.path) as file:
        file.write(manifest.to_json().encode())
    return manifest.path


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest.

    Errors: FileNotFoundError or ValueError, naming the file and the mend.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(p.name for p in path.glob(f"*{MANIFEST_SUFFIX}"))
        raise ValueError(f"{path} is a folder; name one manifest in it: {', '.join(found) or 'it holds none'}")
    if not path.is_file():
        raise FileNotFoundError(f"no manifest at {path}: write one with `python -m data_prep shard`")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a manifest (not JSON: {error}); name a *{MANIFEST_SUFFIX} file") from error
    if not isinstance(body, dict) or body.pop("format", None) != MANIFEST_FORMAT:
        raise ValueError(f"{path} is not a manifest; name a *{MANIFEST_SUFFIX} file")
    if (version := body.pop("version", None)) != MANIFEST_VERSION:
        raise ValueError(f"{path} has version {version}, this code reads {MANIFEST_VERSION}: write the shards again")
    num_samples = body.pop("num_samples", None)
    try:
        manifest = _manifest_of(body, path.parent)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): write the shards again") from error
    _check_counts(manifest, num_samples, path)
    return manifest


def _manifest_of(body: dict[str, Any], folder: Path) -> Manifest:
    body["shards"] = tuple(record_of(ShardRecord, record) for record in body["shards"])
    body["repaired"] = tuple(record_of(Note, note) for note in body["repaired"])
    body["skipped"] = tuple(record_of(Note, note) for note in body["skipped"])
    body["beton"] = None if body["beton"] is None else record_of(BetonRecord, body["beton"])
    body["classes"] = tuple(body["classes"])
    body["class_counts"] = tuple(body["class_counts"])
    if not all(isinstance(name, str) for name in body["classes"]):
        raise TypeError("a class name that is no text")
    if not all(isinstance(count, int) and count >= 0 for count in body["class_counts"]):
        raise TypeError("a class count that is no number")
    return record_of(Manifest, body | {"folder": folder})


def record_of(kind: type[Record], fields: Any) -> Record:
    """Makes a record from what JSON gave. Errors: TypeError or ValueError naming the field of the wrong type."""
    if not isinstance(fields, dict):
        raise TypeError(f"{kind.__name__}: expected an object, found {type(fields).__name__}")
    record = kind(**fields)
    for name, hint in typing.get_type_hints(kind).items():
        origin = typing.get_origin(hint)
        # isinstance takes `int | None`, but of `dict[str, Any]` and `tuple[str, ...]` only the container.
        if not isinstance(getattr(record, name), origin if origin in (dict, tuple) else hint):
            raise TypeError(f"{kind.__name__}.{name} is {getattr(record, name)!r}")
    return record


def _check_counts(manifest: Manifest, num_samples: Any, path: Path) -> None:
    in_shards = sum(shard.samples for shard in manifest.shards)
    if not manifest.num_samples == num_samples == in_shards:
        raise ValueError(
            f"{path} is damaged: {num_samples} samples declared, {in_shards} in its shards, "
            f"{manifest.num_samples} by class; write the shards again"
        )
    if len(manifest.classes) != len(manifest.class_counts):
        raise ValueError(f"{path} is damaged: {len(manifest.classes)} classes, {len(manifest.class_counts)} counts")
    names = [shard.name for shard in manifest.shards] + ([manifest.beton.name] if manifest.beton else [])
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{path} names the file {name!r} outside its own folder: do not trust it")


def pack_index(entries: list[IndexEntry], crc_known: bool = True) -> bytes:
    header = INDEX_HEADER.pack(INDEX_MAGIC, len(entries), FLAG_CRC_KNOWN if crc_known else 0)
    body = header + b"".join(INDEX_RECORD.pack(*entry) for entry in entries)
    return body + INDEX_TRAILER.pack(zlib.crc32(body))


def check_index(data: bytes, path: Path) -> tuple[int, bool]:
    """Checks a whole index file; returns (count, whether its CRCs are known).

    Errors: ValueError naming the file.
    """
    mend = "make it again with `python -m data_prep shard`"
    if len(data) < INDEX_HEADER.size + INDEX_TRAILER.size or data[:8] != INDEX_MAGIC:
        raise ValueError(f"{path} is not a shard index: {mend}")
    _, count, flags = INDEX_HEADER.unpack_from(data)
    if len(data) != INDEX_HEADER.size + count * INDEX_RECORD.size + INDEX_TRAILER.size:
        raise ValueError(f"{path} has {len(data)} bytes, which is wrong for the {count} samples it declares: {mend}")
    (crc,) = INDEX_TRAILER.unpack_from(data, len(data) - INDEX_TRAILER.size)
    if crc != zlib.crc32(memoryview(data)[: -INDEX_TRAILER.size]):
        raise ValueError(f"{path} is damaged (its CRC is wrong): {mend}")
    return count, bool(flags & FLAG_CRC_KNOWN)


def unpack_index(data: bytes, path: Path) -> list[IndexEntry]:
    check_index(data, path)
    records = memoryview(data)[INDEX_HEADER.size : -INDEX_TRAILER.size]
    return [IndexEntry(*record) for record in INDEX_RECORD.iter_unpack(records)]


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` for a writer to fill; on success fsyncs and renames it, else removes it.

    The name carries the process id and a random part, so that two jobs on one target, on whatever machines, never
    write into one file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        publish(temporary, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free = shutil.disk_usage(path.parent).free
        reason = f"{error.strerror} ({free:,} bytes free): make room and run the same command again"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """As atomic_path, but opens the temporary file for writing (and reading back) in binary."""
    with atomic_path(path) as temporary, open(temporary, "w+b") as file:
        yield file


def publish(temporary: Path, path: Path) -> None:
    """Renames a finished, fsynced file to its final name and makes the rename itself durable."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the folder's own entries durable: new names and renames."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
