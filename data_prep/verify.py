"""Re-hash, recount and decode: every fault between a manifest and the files beside it, by name."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from isal.isal_zlib import crc32

from data_prep.foreign import SOURCE_KIND, is_own_info, samples_in
from data_prep.images import PictureError, decode_rgb
from data_prep.manifest import (
    IndexEntry,
    Manifest,
    ShardRecord,
    check_index,
    parse_manifest,
    read_manifest,
    unpack_index,
)
from data_prep.storage import Folder, LocalFolder, open_file
from data_prep.tar_shards import INFO_NAME, file_sha256, timm_split
from data_prep.workers import Progress, map_ordered, silent


@dataclass(frozen=True)
class VerifyOptions:
    """Check a split's shards, indexes and .beton against its manifest. Exit status 1 where there is a fault."""

    manifest: tyro.conf.Positional[str]
    """The split's *.manifest.json, or its URL."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Hashes and counts only; decode nothing."""
    processes: int = 2
    """Local processes."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"--processes {self.processes}: must be at least 1")


@dataclass(frozen=True)
class _ShardJob:
    folder: Folder
    record: ShardRecord
    classes: tuple[str, ...]
    label: str  # which member of a sample tells its class: of a foreign tar, what `index --label` named
    quick: bool


@dataclass
class _Findings:
    faults: list[str] = field(default_factory=list)
    wrong_sha256: str | None = None
    labels: Counter[int] = field(default_factory=Counter)
    keys: list[str] = field(default_factory=list)


def verify(options: VerifyOptions, on_done: Progress = silent) -> list[str]:
    """Returns one line a fault, none where all is well. `on_done` hears of samples as they are checked.

    Errors: ValueError or FileNotFoundError where the manifest itself is missing or damaged.
    """
    folder, manifest = _read_manifest(options.manifest)
    owners = {shard.sha256: shard.name for shard in manifest.shards}
    label = manifest.source.get("label", "cls")
    jobs = [_ShardJob(folder, shard, manifest.classes, label, options.quick) for shard in manifest.shards]
    faults: list[str] = []
    labels: Counter[int] = Counter()
    keys: Counter[str] = Counter()
    for job, findings in zip(jobs, map_ordered(_check_shard, jobs, options.processes), strict=True):
        if findings.wrong_sha256 is not None:
            owner = owners.get(findings.wrong_sha256)  # swapped shards are told by name
            what = f"holds the bytes of {owner}" if owner else "its sha256 is not the manifest's"
            faults.append(f"{job.record.name}: {what}")
        faults += findings.faults
        labels += findings.labels
        keys.update(findings.keys)
        on_done(job.record.samples, job.record.bytes, manifest.num_samples)
    if not options.quick and manifest.shards:
        faults += [f"key {key} occurs {count} times in the split" for key, count in keys.items() if count > 1]
        for label_id, (name, declared) in enumerate(zip(manifest.classes, manifest.class_counts, strict=True)):
            if labels[label_id] != declared:
                faults.append(f"class {name!r}: {labels[label_id]} samples in the shards, {declared} in the manifest")
    if manifest.shards:
        faults += _check_folder(folder, manifest)
    if manifest.beton is not None:
        faults += _beton_faults(folder, manifest, options.quick, shards_are_good=not faults)
    return faults


def _read_manifest(url: str) -> tuple[Folder, Manifest]:
    folder, name = open_file(url)
    if isinstance(folder, LocalFolder) and not (folder.path / name).is_file():
        read_manifest(folder.path / name)  # says what is wrong: a folder, or nothing there
    path = folder.path if isinstance(folder, LocalFolder) else Path()
    return folder, parse_manifest(folder.read(name), folder.where(name), path)


def _beton_faults(folder: Folder, manifest: Manifest, quick: bool, shards_are_good: bool) -> Iterator[str]:
    from data_prep.beton_verify import check_beton

    if not isinstance(folder, LocalFolder):
        assert manifest.beton is not None
        yield f"{manifest.beton.name}: cannot be checked in a store: copy it to a disk, with its manifest"
        return
    yield from check_beton(manifest, quick, shards_are_good)


def _check_folder(folder: Folder, manifest: Manifest) -> Iterator[str]:
    """Shards that nobody declared, and what timm is told."""
    declared = {shard.name for shard in manifest.shards}
    for name in folder.names(f"{manifest.split}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"):
        if name not in declared:
            yield f"{name}: not in the manifest"
    if manifest.source.get("kind") == SOURCE_KIND and not is_own_info(folder):
        return  # the tars' maker's own, which `index` left alone
    try:
        info = json.loads(folder.read(INFO_NAME).decode())
        same = info["splits"][manifest.split] == timm_split(manifest)
    except (OSError, ValueError, TypeError, KeyError):
        same = False
    if not same:
        yield f"{INFO_NAME}: missing, damaged, or not what the manifest says of {manifest.split!r} (timm reads it)"


def _check_shard(job: _ShardJob) -> _Findings:
    record, findings = job.record, _Findings()
    entries, crc_known = _check_index(job, findings.faults)
    size = job.folder.size(record.name)
    if size is None:
        findings.faults.append(f"{record.name}: missing")
        return findings
    if size != record.bytes:
        findings.faults.append(f"{record.name}: {size} bytes, the manifest says {record.bytes}")
    with job.folder.local(record.name) as tar:
        if record.sha256 is None or not crc_known:
            findings.faults.append(f"{record.name}: unverified, for it was indexed without its hashes: `index --hash`")
        elif (sha256 := file_sha256(tar)) != record.sha256:
            findings.wrong_sha256 = sha256
        if not job.quick:
            _check_members(job, tar, entries, crc_known, findings)
    return findings


def _check_index(job: _ShardJob, faults: list[str]) -> tuple[list[IndexEntry] | None, bool]:
    """The index's entries where it can be used, and whether it knows CRCs."""
    name = job.record.index_name
    if job.folder.size(name) is None:
        faults.append(f"{name}: missing")
        return None, True
    data = job.folder.read(name)
    if hashlib.sha256(data).hexdigest() != job.record.index_sha256:
        faults.append(f"{name}: its sha256 is not the manifest's")
    try:
        _, crc_known = check_index(data, Path(name))
        entries = unpack_index(data, Path(name))
    except ValueError as error:
        faults.append(f"{name}: cannot be used: {error}")
        return None, True
    if len(entries) != job.record.samples:
        faults.append(f"{name}: {len(entries)} samples, the manifest says {job.record.samples}")
    return entries, crc_known


def _check_members(
    job: _ShardJob, tar: Path, entries: list[IndexEntry] | None, crc_known: bool, findings: _Findings
) -> None:
    """Walks the tar as any other reader would, and compares what it finds with the index."""
    shard, found = job.record.name, 0
    try:
        with open(tar, "rb") as file:
            for sample in samples_in(tar, job.label):
                name, picture = f"{shard}: {sample.key}", sample.picture
                found += 1
                findings.keys.append(sample.key)
                label = job.classes.index(sample.label) if isinstance(sample.label, str) else sample.label
                findings.labels[label] += 1
                if not 0 <= label < len(job.classes):
                    findings.faults.append(f"{name}: label {label}, but there are {len(job.classes)} classes")
                data = os.pread(file.fileno(), picture.size, picture.offset)
                if entries is not None and found <= len(entries):
                    entry = entries[found - 1]
                    if (entry.offset, entry.size, entry.label) != (picture.offset, picture.size, label):
                        findings.faults.append(f"{name}: place, size or label is not what the index says")
                    if crc_known and entry.crc32 != crc32(data):
                        findings.faults.append(f"{name}: its CRC is not what the index says")
                try:
                    decode_rgb(data)
                except PictureError as error:
                    findings.faults.append(f"{name}: {error}")
    except (ValueError, OSError) as error:
        findings.faults.append(f"{shard}: broken after {found} samples ({error})")
    if entries is not None and found != len(entries):
        findings.faults.append(f"{shard}: {found} samples can be read, the index says {len(entries)}")
