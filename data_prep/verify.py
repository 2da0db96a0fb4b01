"""Re-hash, recount and decode: every fault between a manifest and the files beside it, by name."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from data_prep.beton import BetonReader, encode, load_ffcv, similar
from data_prep.images import PictureError, decode_rgb
from data_prep.manifest import BetonRecord, IndexEntry, Manifest, ShardRecord, read_manifest, unpack_index
from data_prep.tar_shards import (
    INFO_NAME,
    LABEL_SUFFIX,
    PICTURE_SUFFIX,
    file_sha256,
    read_index,
    read_pictures,
    timm_split,
)
from data_prep.workers import Progress, map_ordered, silent


@dataclass(frozen=True)
class VerifyOptions:
    """Check a split's shards, indexes and .beton against its manifest. Exit status 1 where there is a fault."""

    manifest: tyro.conf.Positional[Path]
    """The split's *.manifest.json."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Hashes and counts only; decode nothing."""
    processes: int = 2
    """Local processes."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"--processes {self.processes}: must be at least 1")


@dataclass(frozen=True)
class _ShardJob:
    folder: Path
    record: ShardRecord
    owners: dict[str, str]  # sha256 -> name of the shard that has it, to tell swapped shards
    num_classes: int
    quick: bool


@dataclass
class _Findings:
    faults: list[str] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)
    keys: list[str] = field(default_factory=list)


def verify(options: VerifyOptions, on_done: Progress = silent) -> list[str]:
    """Returns one line a fault, none where all is well. `on_done` hears of samples as they are checked.

    Errors: ValueError or FileNotFoundError where the manifest itself is missing or damaged.
    """
    manifest = read_manifest(options.manifest)
    owners = {shard.sha256: shard.name for shard in manifest.shards}
    jobs = [
        _ShardJob(manifest.folder, shard, owners, len(manifest.classes), options.quick) for shard in manifest.shards
    ]
    faults: list[str] = []
    labels: Counter[int] = Counter()
    keys: Counter[str] = Counter()
    for job, findings in zip(jobs, map_ordered(_check_shard, jobs, options.processes), strict=True):
        faults += findings.faults
        labels += findings.labels
        keys.update(findings.keys)
        on_done(job.record.samples, manifest.num_samples)
    if not options.quick:
        faults += [f"key {key} occurs {count} times in the split" for key, count in keys.items() if count > 1]
        for label, (name, declared) in enumerate(zip(manifest.classes, manifest.class_counts, strict=True)):
            if labels[label] != declared:
                faults.append(f"class {name!r}: {labels[label]} samples in the shards, {declared} in the manifest")
    faults += _check_folder(manifest)
    if manifest.beton is not None:
        faults += _check_beton(manifest, manifest.beton, options.quick, shards_are_good=not faults)
    return faults


def _check_folder(manifest: Manifest) -> Iterator[str]:
    """Shards that nobody declared, and what timm is told."""
    declared = {shard.name for shard in manifest.shards}
    for path in sorted(manifest.folder.glob(f"{manifest.split}-[0-9][0-9][0-9][0-9][0-9][0-9].tar")):
        if path.name not in declared:
            yield f"{path.name}: not in the manifest"
    try:
        info = json.loads((manifest.folder / INFO_NAME).read_text(encoding="utf-8"))
        same = info["splits"][manifest.split] == timm_split(manifest)
    except (OSError, ValueError, TypeError, KeyError):
        same = False
    if not same:
        yield f"{INFO_NAME}: missing, damaged, or not what the manifest says of {manifest.split!r} (timm reads it)"


def _check_shard(job: _ShardJob) -> _Findings:
    record, tar = job.record, job.folder / job.record.name
    findings = _Findings()
    entries = _check_index(job, findings.faults)
    if not tar.is_file():
        findings.faults.append(f"{record.name}: missing")
        return findings
    if (size := tar.stat().st_size) != record.bytes:
        findings.faults.append(f"{record.name}: {size} bytes, the manifest says {record.bytes}")
    if (sha256 := file_sha256(tar)) != record.sha256:
        owner = job.owners.get(sha256)
        what = f"holds the bytes of {owner}" if owner else "its sha256 is not the manifest's"
        findings.faults.append(f"{record.name}: {what}")
    if not job.quick:
        _check_members(tar, entries, job.num_classes, findings)
    return findings


def _check_index(job: _ShardJob, faults: list[str]) -> list[IndexEntry] | None:
    path = job.folder / job.record.index_name
    if not path.is_file():
        faults.append(f"{path.name}: missing")
        return None
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != job.record.index_sha256:
        faults.append(f"{path.name}: its sha256 is not the manifest's")
    try:
        entries = unpack_index(data, Path(path.name))
    except ValueError as error:
        faults.append(f"{path.name}: cannot be used: {error}")
        return None
    if len(entries) != job.record.samples:
        faults.append(f"{path.name}: {len(entries)} samples, the manifest says {job.record.samples}")
    return entries


def _check_members(tar: Path, entries: list[IndexEntry] | None, num_classes: int, findings: _Findings) -> None:
    """Walks the tar as any other reader would, and compares what it finds with the index."""
    found = 0
    try:
        for key, offset, picture, label in _samples(tar):
            name = f"{tar.name}: {key}"
            found += 1
            findings.keys.append(key)
            findings.labels[label] += 1
            if not 0 <= label < num_classes:
                findings.faults.append(f"{name}: label {label}, but there are {num_classes} classes")
            if entries is not None and found <= len(entries):
                entry = entries[found - 1]
                if (entry.offset, entry.size, entry.label) != (offset, len(picture), label):
                    findings.faults.append(f"{name}: place, size or label is not what the index says")
                if entry.crc32 != zlib.crc32(picture):
                    findings.faults.append(f"{name}: its CRC is not what the index says")
            try:
                decode_rgb(picture)
            except PictureError as error:
                findings.faults.append(f"{name}: {error}")
    except (tarfile.TarError, ValueError, OSError) as error:
        findings.faults.append(f"{tar.name}: broken after {found} samples ({error})")
    if entries is not None and found != len(entries):
        findings.faults.append(f"{tar.name}: {found} samples can be read, the index says {len(entries)}")


def _samples(tar: Path) -> Iterator[tuple[str, int, bytes, int]]:
    """Yields (key, offset of the picture's bytes, the bytes, label). Errors: ValueError where the layout is another."""
    with tarfile.open(tar, "r:") as file:
        while (member := file.next()) is not None:
            key = member.name.removesuffix(PICTURE_SUFFIX)
            label_member = file.next()
            if label_member is None or (member.name, label_member.name) != (key + PICTURE_SUFFIX, key + LABEL_SUFFIX):
                raise ValueError(f"member {member.name!r} is not a picture with its label after it")
            picture, label = file.extractfile(member), file.extractfile(label_member)
            if picture is None or label is None:
                raise ValueError(f"member {member.name!r} is no plain file")
            yield key, member.offset_data, picture.read(), int(label.read())


def _check_beton(manifest: Manifest, record: BetonRecord, quick: bool, shards_are_good: bool) -> Iterator[str]:
    path = manifest.folder / record.name
    if not path.is_file():
        yield f"{record.name}: missing"
        return
    if (size := path.stat().st_size) != record.bytes:
        yield f"{record.name}: {size} bytes, the manifest says {record.bytes}"
    if file_sha256(path) != record.sha256:
        yield f"{record.name}: its sha256 is not the manifest's"
    elif not quick and shards_are_good:  # else there is nothing to compare with
        yield from _compare_beton(manifest, record, path)


def _compare_beton(manifest: Manifest, record: BetonRecord, path: Path) -> Iterator[str]:
    """The same samples and labels, read through ffcv's library."""
    load_ffcv()  # its absence is the user's to mend, not a fault of the file
    try:
        reader = BetonReader(path)
    except ValueError as error:
        yield str(error)
        return
    if not len(reader) == manifest.num_samples == record.samples:
        yield f"{record.name}: {len(reader)} samples, the manifest says {manifest.num_samples}"
        return
    sample_id = 0
    for shard in manifest.shards:
        entries = read_index(manifest.folder, shard)
        for entry, data in zip(entries, read_pictures(manifest.folder / shard.name, entries), strict=True):
            if (label := int(reader.labels[sample_id])) != entry.label:
                yield f"{record.name}: sample {sample_id} has label {label}, in {shard.name} it has {entry.label}"
            try:
                picture = reader.picture(sample_id)
            except ValueError as error:
                yield str(error)
            else:
                if not _same_picture(reader, sample_id, picture, data, record):
                    yield f"{record.name}: sample {sample_id} is not the picture of {shard.name}"
            sample_id += 1


def _same_picture(reader: BetonReader, sample_id: int, picture: np.ndarray, data: bytes, record: BetonRecord) -> bool:
    expected = encode(data, sample_id, record.mode, record.max_resolution, record.jpeg_quality)
    if bytes(reader.payload(sample_id)) == expected.payload:
        return True
    # Encoded by another version of Pillow: the bytes may differ, the picture must not.
    if expected.mode == "jpg":
        return similar(picture, decode_rgb(expected.payload))
    shape = (expected.height, expected.width, 3)
    return similar(picture, np.frombuffer(expected.payload, np.uint8).reshape(shape))
