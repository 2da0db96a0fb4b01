"""WebDataset tars that others made get this project's index and manifest, and stay as they are (`index`)."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from isal.isal_zlib import crc32

from data_prep.finalize import write_manifest_to
from data_prep.index_records import INDEX, pack_records
from data_prep.manifest import MANIFEST_SUFFIX, Manifest, ShardRecord, parse_manifest
from data_prep.sources import PICTURE_SUFFIXES
from data_prep.sources.names import read_classes
from data_prep.storage import Folder, LocalFolder, open_file, open_folder
from data_prep.tar_headers import Member, members_in
from data_prep.tar_shards import INFO_NAME, update_info
from data_prep.workers import Progress, map_ordered, silent

SOURCE_KIND = "webdataset-tars"
_PICTURES = frozenset(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)
_MAX_LABEL = 999_999  # far above any set's; the names of a wild number's classes would fill the memory
_MAX_PICTURE = (1 << 32) - 1  # bytes: what an index can hold
_BAD_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # no line of a file of classes, or no UTF-8
_INFO_ENTRY = {"name", "num_samples", "filenames", "shard_lengths"}
_BLOCK = 8 << 20  # bytes hashed at once: far more than it costs to hand them to a thread


@dataclass(frozen=True)
class IndexOptions:
    """Give WebDataset tars made by others an index and a manifest, without writing them anew."""

    tars: tyro.conf.Positional[tuple[str, ...]]
    """The tars, in the order of their samples, or the folder of them all. They lie in one folder, which gets the
    index of each and the manifest. A URL that fsspec reads will do: its tars are fetched one by one."""
    split: str = "train"
    """Name of the split."""
    label: str = "cls"
    """The member of each sample that holds its class's number (`cls`), or the field of its .json (`json:label`): a
    number, or a class's name."""
    classes: Path | None = None
    """Text file with one class a line, in the order of the numbers; without it numbers are their own names."""
    hash: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read the tars whole, for the CRC of each picture and the sha256 of each tar. Without them only headers are read,
    and nothing can be verified."""
    processes: int = 2
    """Local processes; the result does not depend on it."""

    def __post_init__(self) -> None:
        if not self.tars:
            raise ValueError("name WebDataset tars, or the folder of them")
        if not self.split or not all(c.isascii() and (c.isalnum() or c in "_-") for c in self.split):
            raise ValueError(f"--split {self.split!r}: use letters, digits, _ and - only")
        if self.processes < 1:
            raise ValueError(f"--processes {self.processes}: must be at least 1")
        suffix, _, name = self.label.partition(":")
        if not suffix or (suffix == "json") != bool(name):
            raise ValueError(f"--label {self.label!r}: name a member's suffix (cls), or json:FIELD")


class TarSample(NamedTuple):
    """One sample of a WebDataset tar."""

    key: str
    picture: Member
    label: int | str  # as it stands there


class _Indexed(NamedTuple):
    """What a process found in one tar."""

    records: np.ndarray  # dtype INDEX; label 0 where it is a name
    names: list[str] | None  # the labels, where they are names
    keys: list[str]
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class _TarJob:
    folder: Folder
    name: str
    label: str
    hash: bool


def index(options: IndexOptions, on_done: Progress = silent) -> Manifest:
    """Writes an index beside each tar, and the manifest. `on_done` hears of samples as they are indexed.

    timm's `_info.json` is kept up where it is absent or of this project; another maker's stays as it is.
    Errors: ValueError or OSError naming the tar, the member and the mend; nothing is then written.
    """
    folder, names = _find(options.tars)
    before = _own_manifest(folder, options.split)
    jobs = [_TarJob(folder, name, options.label, options.hash) for name in names]
    found: list[_Indexed] = []
    seen: set[str] = set()
    for job, part in zip(jobs, map_ordered(_index_tar, jobs, options.processes), strict=True):
        for key in part.keys:
            if key in seen:
                raise ValueError(f"{folder.where(job.name)}: sample {key!r} is in another tar too: leave one out")
            seen.add(key)
        found.append(part._replace(keys=[]))
        on_done(len(part.records), part.bytes, 0)
    classes = _classes(options, found)
    counts = _count(found, classes)
    packed = [pack_records(part.records, options.hash) for part in found]
    shards = tuple(_shard_record(job.name, part, data) for job, part, data in zip(jobs, found, packed, strict=True))
    _refuse_indexes_of_other_splits(folder, options.split, shards)
    manifest = Manifest(
        split=options.split,
        classes=classes,
        class_counts=counts,
        shards=shards,
        source={"kind": SOURCE_KIND, "label": options.label},
        options={},
        beton=before.beton if before and (before.shards, before.classes) == (shards, classes) else None,
        folder=folder.path if isinstance(folder, LocalFolder) else Path(),
    )
    for record, data in zip(shards, packed, strict=True):
        with folder.file(record.index_name) as file:
            file.write(data)
    write_manifest_to(folder, manifest)
    if is_own_info(folder):
        update_info(folder, options.split, manifest)
    return manifest


def _find(tars: Sequence[str]) -> tuple[Folder, list[str]]:
    """The folder of the tars, and their names."""
    if len(tars) == 1 and not str(tars[0]).endswith(".tar"):
        folder = open_folder(tars[0])
        names = folder.names("*.tar")
        if not names:
            raise FileNotFoundError(f"{tars[0]} holds no *.tar: name WebDataset tars, or the folder of them")
        return folder, names
    places = [open_file(url) for url in tars]
    folders = {folder.where(): folder for folder, _ in places}
    if len(folders) != 1:
        raise ValueError(f"the tars lie in {len(folders)} folders, a manifest names files of its own: index each alone")
    folder, names = next(iter(folders.values())), [name for _, name in places]
    for name in names:
        if not name.endswith(".tar") or folder.size(name) is None:
            raise FileNotFoundError(f"{folder.where(name)} is no *.tar that is there: name WebDataset tars")
    if len(set(names)) != len(names):
        raise ValueError(f"{folder.where()}: one tar is named twice: name each once")
    return folder, names


def _own_manifest(folder: Folder, split: str) -> Manifest | None:
    """The manifest that an earlier `index` left. Errors: ValueError where it is of shards that the project wrote."""
    name = f"{split}{MANIFEST_SUFFIX}"
    if folder.size(name) is None:
        return None
    before = parse_manifest(folder.read(name), folder.where(name), Path())
    if before.source.get("kind") != SOURCE_KIND:
        raise ValueError(
            f"{folder.where(name)} is of shards that this project wrote: name another --split, or remove it"
        )
    return before


def _refuse_indexes_of_other_splits(folder: Folder, split: str, shards: Sequence[ShardRecord]) -> None:
    """Errors: ValueError where the index of a tar is another manifest's too, and would no longer be what that says."""
    new = {record.index_name: record.index_sha256 for record in shards}
    for name in folder.names(f"*{MANIFEST_SUFFIX}"):
        if name == f"{split}{MANIFEST_SUFFIX}":
            continue
        for record in parse_manifest(folder.read(name), folder.where(name), Path()).shards:
            if new.get(record.index_name, record.index_sha256) != record.index_sha256:
                raise ValueError(
                    f"{folder.where(record.index_name)} is also the index of {name}, which records another: give "
                    "--hash, --label and --classes as for that, or remove it"
                )


def is_own_info(folder: Folder) -> bool:
    """Whether timm's `_info.json` is absent, or holds what this project writes and no more."""
    if folder.size(INFO_NAME) is None:
        return True
    try:
        info = json.loads(folder.read(INFO_NAME))
        return info.keys() == {"splits"} and all(entry.keys() == _INFO_ENTRY for entry in info["splits"].values())
    except (ValueError, AttributeError, RecursionError):
        return False


def _index_tar(job: _TarJob) -> _Indexed:
    # In columns: a tuple a sample would have Python's garbage collector walk through millions of them.
    keys: list[str] = []
    names: list[str] = []
    columns = offsets, sizes, labels = array("q"), array("q"), array("q")
    with job.folder.local(job.name) as path:
        for key, picture, label in samples_in(path, job.label):
            keys.append(key)
            offsets.append(picture.offset)
            sizes.append(picture.size)
            if isinstance(label, str):
                names.append(label)
                label = 0
            labels.append(label)
        if not keys:
            raise ValueError(f"{job.folder.where(job.name)} holds no sample: leave it out")
        if names and len(names) != len(keys):
            raise ValueError(f"{job.folder.where(job.name)}: some labels are numbers, others names: see --label")
        sha256, crcs = hashes_of(path, offsets, sizes) if job.hash else (None, 0)
        records = np.zeros(len(keys), INDEX)
        for name, column in zip(("offset", "size", "label"), columns, strict=True):
            records[name] = column
        records["crc32"] = crcs
        return _Indexed(records, names or None, keys, path.stat().st_size, sha256)


def samples_in(path: Path, label: str) -> Iterator[TarSample]:
    """The samples of a WebDataset tar, in its order; members that are neither picture nor label are passed over.

    Errors: ValueError naming the tar and the sample: more or less than one picture, no label or none that is a number
    of 0 or more (or, of a .json, a name), a sample whose members are apart, and all that members_in refuses.
    """
    suffix, _, field = label.partition(":")
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            raise ValueError(f"{path} is empty: fetch it again")
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            yield from _Samples(data, suffix.lower(), field, str(path)).walk()


class _Samples:
    """Puts a tar's members together to samples; 2 us each, for there are millions."""

    def __init__(self, data: mmap.mmap, suffix: str, field: str, where: str) -> None:
        self.data, self.suffix, self.field, self.where = data, suffix, field, where
        self.seen: set[str] = set()

    def walk(self) -> Iterator[TarSample]:
        key, picture, label = "", None, None
        for member in members_in(self.data, 0, len(self.data), self.where):
            name = member.name
            # Split at the first dot of the last part, as the webdataset library does.
            base = name.rfind("/") + 1
            dot = name.find(".", base)
            if dot <= base:  # hidden, or without an ending: the library passes it over too
                continue
            if name[:dot] != key:
                if key:
                    yield self._sample(key, picture, label)
                key, picture, label = name[:dot], None, None
            ending = name[dot + 1 :].lower()
            if ending == self.suffix:
                if label is not None:
                    raise ValueError(f"{self.where}: sample {key!r} has two .{ending}: remove one")
                label = member
            elif ending in _PICTURES:
                if picture is not None:
                    raise ValueError(f"{self.where}: sample {key!r} has two pictures: remove one")
                picture = member
        if key:
            yield self._sample(key, picture, label)

    def _sample(self, key: str, picture: Member | None, label: Member | None) -> TarSample:
        if key in self.seen:
            raise ValueError(f"{self.where}: the members of sample {key!r} do not follow one another: write it again")
        self.seen.add(key)
        if picture is None:
            raise ValueError(f"{self.where}: sample {key!r} has no picture: remove or mend it")
        if picture.size > _MAX_PICTURE:
            raise ValueError(
                f"{self.where}: {picture.name} has {picture.size:,} bytes, which no picture has: remove it"
            )
        if label is None:
            raise ValueError(f"{self.where}: sample {key!r} has no .{self.suffix}: say where its label is with --label")
        text = self.data[label.offset : label.offset + label.size]
        if not self.field and text.isdigit() and len(text) <= len(str(_MAX_LABEL)):
            return TarSample(key, picture, int(text))
        return TarSample(key, picture, self._odd_label(key, label, text))

    def _odd_label(self, key: str, member: Member, text: bytes) -> int | str:
        try:
            value = json.loads(text)[self.field] if self.field else int(text)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"{self.where}: {member.name} holds no label {self.field or ''} but {text[:40]!r}: see --label"
            ) from None
        if isinstance(value, bool) or not isinstance(value, int | str) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{self.where}: the label of {key!r} is {value!r}, no number of 0 or more, nor a name")
        if isinstance(value, int) and value > _MAX_LABEL:
            raise ValueError(f"{self.where}: the label of {key!r} is {value}, which is no class's number: see --label")
        if isinstance(value, str) and (not value.strip() or _BAD_NAME.search(value)):
            raise ValueError(f"{self.where}: the label of {key!r} is {value!r}, which is no class's name: see --label")
        return value


def hashes_of(path: Path, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[str, list[int]]:
    """(sha256 of the file, CRC-32 of the bytes at each place), the file read once; the places are in order."""
    digest, crcs = hashlib.sha256(), [0] * len(offsets)
    first = 0
    # Both release the interpreter: CRCs cost a quarter of what sha256 does, and pass beside it on a second core.
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        buffers, start, turn = (bytearray(_BLOCK), bytearray(_BLOCK)), 0, 0
        hashing = pool.submit(lambda: None)
        while count := file.readinto(buffers[turn]):
            block = memoryview(buffers[turn])[:count]
            hashing.result()
            hashing = pool.submit(digest.update, block)
            for number in range(first, len(offsets)):
                offset, size = offsets[number], sizes[number]
                if offset >= start + count:
                    break
                part = block[max(0, offset - start) : offset + size - start]
                crcs[number] = crc32(part, crcs[number])
                if offset + size <= start + count:
                    first = number + 1
            start, turn = start + count, 1 - turn
        hashing.result()
    return digest.hexdigest(), crcs


def _classes(options: IndexOptions, found: list[_Indexed]) -> tuple[str, ...]:
    """Class names in the order of the labels; labels that are names get their numbers here."""
    named = [part.names is not None for part in found]
    if any(named) and not all(named):
        raise ValueError("the labels of some tars are numbers, of others names: index them as two splits")
    given = None if options.classes is None else read_classes(str(options.classes))
    if all(named):
        return given or tuple(sorted({name for part in found for name in part.names or ()}))
    count = 1 + max(int(part.records["label"].max()) for part in found)
    if given is None:
        return tuple(str(label) for label in range(count))
    if len(given) < count:
        raise ValueError(f"--classes {options.classes} names {len(given)} classes, but there is a label {count - 1}")
    return given


def _count(found: list[_Indexed], classes: tuple[str, ...]) -> tuple[int, ...]:
    """Pictures of each class. Numbers labels that are names, in place."""
    numbers = {name: number for number, name in enumerate(classes)}
    counts = np.zeros(len(classes), np.int64)
    for part in found:
        if part.names is not None:
            if unknown := set(part.names) - numbers.keys():
                raise ValueError(f"the class {min(unknown)!r} of a sample is not in --classes: add it")
            part.records["label"] = [numbers[name] for name in part.names]
        counts += np.bincount(part.records["label"], minlength=len(classes))
    return tuple(counts.tolist())


def _shard_record(name: str, part: _Indexed, index: bytes) -> ShardRecord:
    return ShardRecord(name, len(part.records), part.bytes, part.sha256, hashlib.sha256(index).hexdigest())
