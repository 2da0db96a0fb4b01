"""Manifest and shard index: the contract between ``data_prep``, which writes, and ``pipeline.data``, which reads.

Standard library only, so that both sides can import it without pulling in the other's dependencies.

A *split* (train, val) is described by ``<split>.manifest.json``. The order of its shards, and of the samples inside
each, defines the **sample id**: 0 to n-1, for ever. A .beton holds the same samples in the same order.

Index file (``<shard>.idx``), little endian: 8 bytes magic, ``u64`` count, ``u32`` flags, then one 20-byte record a
sample (``u64`` offset, ``u32`` size, ``i32`` label, ``u32`` CRC-32 of the picture's bytes), then the CRC-32 of all
that came before. Fixed-size records let a reader map the file and find sample i without parsing the rest. A .beton has
one too (``<beton>.idx``), of its payloads as they are stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
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
MANIFEST_VERSION = 2
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
    sha256: str | None  # None: a foreign tar that was indexed without hashing, so nothing can be verified of it
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
    index_sha256: str
    mode: str  # "raw", "jpg" or "proportion"
    max_resolution: int | None  # longest side in pixels, None where the originals were kept
    jpeg_quality: int | None
    tables_sha256: str | None = None  # of header, fields, metadata and table of places; None in older manifests

    @property
    def index_name(self) -> str:
        return f"{self.name}.idx"


@dataclass(frozen=True)
class Note:
    """A sample that was repaired or skipped, and why."""

    key: str
    path: str  # in the source
    reason: str  # the same text for the same fault, so that reasons can be counted


@dataclass(frozen=True)
class Manifest:
    """All that a reader must know of one split. It holds no times and no process counts: same input, same bytes.

    A split has shards, a .beton of them, or a .beton alone.
    """

    split: str
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    shards: tuple[ShardRecord, ...]
    source: dict[str, Any]
    options: dict[str, Any]
    repaired: tuple[Note, ...] = ()
    skipped: tuple[Note, ...] = ()
    beton: BetonRecord | None = None
    class_names: tuple[str, ...] = ()  # readable, in the order of classes; empty where none were given
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
        held = [shard.sha256 or shard.index_sha256 for shard in self.shards]
        if not held and self.beton is not None:
            held = [self.beton.sha256]
        for text in (*self.classes, *held):
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
    return parse_manifest(path.read_bytes(), str(path), path.parent)


def parse_manifest(data: bytes, where: str, folder: Path) -> Manifest:
    """The manifest in a file's bytes. Errors: ValueError naming `where` and the mend."""
    try:
        body = json.loads(data.decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where} is not a manifest (not JSON: {error}); name a *{MANIFEST_SUFFIX} file") from error
    if not isinstance(body, dict) or body.pop("format", None) != MANIFEST_FORMAT:
        raise ValueError(f"{where} is not a manifest; name a *{MANIFEST_SUFFIX} file")
    if (version := body.pop("version", None)) != MANIFEST_VERSION:
        raise ValueError(f"{where} has version {version}, this code reads {MANIFEST_VERSION}: write the shards again")
    num_samples = body.pop("num_samples", None)
    try:
        manifest = _manifest_of(body, folder)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{where} is damaged ({error}): write the shards again") from error
    _check_counts(manifest, num_samples, where)
    return manifest


def _manifest_of(body: dict[str, Any], folder: Path) -> Manifest:
    body["shards"] = tuple(record_of(ShardRecord, record) for record in body["shards"])
    body["repaired"] = tuple(record_of(Note, note) for note in body["repaired"])
    body["skipped"] = tuple(record_of(Note, note) for note in body["skipped"])
    body["beton"] = None if body["beton"] is None else record_of(BetonRecord, body["beton"])
    body["classes"] = tuple(body["classes"])
    body["class_counts"] = tuple(body["class_counts"])
    body["class_names"] = tuple(body["class_names"])
    if not all(isinstance(name, str) for name in (*body["classes"], *body["class_names"])):
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


def _check_counts(manifest: Manifest, num_samples: Any, where: str) -> None:
    held = sum(shard.samples for shard in manifest.shards)
    if not manifest.shards and manifest.beton is not None:
        held = manifest.beton.samples
    if not manifest.num_samples == num_samples == held:
        raise ValueError(
            f"{where} is damaged: {num_samples} samples declared, {held} in its files, "
            f"{manifest.num_samples} by class; write the shards again"
        )
    lengths = len(manifest.classes), len(manifest.class_counts), len(manifest.class_names) or len(manifest.classes)
    if len(set(lengths)) > 1:
        raise ValueError(f"{where} is damaged: {lengths[0]} classes, {lengths[1]} counts, {lengths[2]} readable names")
    names = [shard.name for shard in manifest.shards] + ([manifest.beton.name] if manifest.beton else [])
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{where} names the file {name!r} outside its own folder: do not trust it")


def pack_index(entries: list[IndexEntry], crc_known: bool = True) -> bytes:
    header = INDEX_HEADER.pack(INDEX_MAGIC, len(entries), FLAG_CRC_KNOWN if crc_known else 0)
    body = header + b"".join(INDEX_RECORD.pack(*entry) for entry in entries)
    return body + INDEX_TRAILER.pack(zlib.crc32(body))


def check_index(data: bytes | memoryview, path: Path) -> tuple[int, bool]:
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
    write into one file. It is locked while it is written, so that `remove_orphans` can tell it from a dead job's.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    lock = _create_locked(temporary)
    try:
        yield temporary
        os.fsync(lock)
        publish(temporary, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        written, free = os.fstat(lock).st_size, shutil.disk_usage(path.parent).free
        reason = (
            f"{error.strerror} ({written:,} bytes of it written, {free:,} bytes free): make room and run the same "
            "command again"
        )
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def _create_locked(path: Path) -> int:
    """Makes an empty file and locks it; returns its descriptor."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # A sweep may have taken it for an orphan in the moment before it was locked.
        if path.exists() and os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)


def remove_orphans(folder: Path, pattern: str) -> int:
    """Removes temporary files of jobs that were killed, for final names that match `pattern`; returns how many.

    A file whose writer lives, on whatever machine the file system's locks reach, stays.
    """
    removed = 0
    for path in folder.glob(f".{pattern}.*.tmp"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed += 1
    return removed


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
