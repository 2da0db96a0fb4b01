"""Shards over local processes: skips what is done, and gives the same bytes for any number of processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep.images import PILLOW_MAX_MEGAPIXELS, PictureError, prepare_picture
from data_prep.manifest import (
    Manifest,
    Note,
    ShardRecord,
    atomic_file,
    manifest_path,
    read_manifest,
    record_of,
    write_manifest,
)
from data_prep.plan import plan_shards, shard_name
from data_prep.sources import ImageFolder, Listing, Sample
from data_prep.tar_shards import is_intact, update_info, write_tar
from data_prep.workers import Progress, map_ordered, silent

# Changes when the same pictures and options no longer give the same shards; older finished shards are then done again.
LAYOUT_VERSION = 1


@dataclass(frozen=True)
class ShardOptions:
    """Write WebDataset tars, an index for each, and the manifest. Run again after an interruption, it goes on."""

    source: Path
    """Folder with one folder of pictures a class."""
    out: Path
    """Folder to write into; it may hold other splits."""
    split: str = "train"
    """Name of the split: names the shards and the manifest."""
    samples_per_shard: int = 1000
    """Pictures in each shard but the last."""
    seed: int = 0
    """Seed of the order, in which each shard mixes the classes."""
    keep_order: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep the source's order (class by class) instead of shuffling."""
    processes: int = 2
    """Local processes; the result does not depend on it."""
    on_error: Literal["fail", "skip"] = "fail"
    """At a picture that cannot be read: stop, or leave it out and list it in the manifest."""
    max_megapixels: float = 50.0
    """Largest picture, by its header, that is decoded at all."""

    def __post_init__(self) -> None:
        if not self.split or not all(c.isascii() and (c.isalnum() or c in "_-") for c in self.split):
            raise ValueError(f"--split {self.split!r}: use letters, digits, _ and - only")
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard {self.samples_per_shard}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must be 0 or more")
        if self.processes < 1:
            raise ValueError(f"--processes {self.processes}: must be at least 1")
        if not 0 < self.max_megapixels <= PILLOW_MAX_MEGAPIXELS:
            raise ValueError(
                f"--max-megapixels {self.max_megapixels:g}: must be over 0, at most {PILLOW_MAX_MEGAPIXELS}"
            )

    def lasting(self) -> dict[str, Any]:
        """The options that the result depends on."""
        names = ("samples_per_shard", "seed", "keep_order", "max_megapixels")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ShardJob:
    """All that a process needs to write one shard."""

    source: ImageFolder
    out: Path
    split: str
    name: str
    samples: tuple[Sample, ...]
    max_megapixels: float
    on_error: str

    @property
    def part_path(self) -> Path:
        return self.out / f".{self.split}.parts" / f"{self.name}.json"

    def digest(self) -> str:
        """Of all that the shard's bytes depend on; a picture's bytes stand in it by its file's size and time."""
        digest = hashlib.sha256(f"{LAYOUT_VERSION} {self.max_megapixels}\n".encode())
        for sample in self.samples:
            line = f"{sample.key}\0{sample.path}\0{sample.label}\0{self.source.stamp(sample)}\n"
            digest.update(line.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Part:
    """A finished shard's record, kept in a file of its own so that an interrupted run goes on after it."""

    digest: str
    shard: ShardRecord
    labels: dict[str, int]  # label -> pictures; JSON wants text for keys
    repaired: tuple[Note, ...] = field(default=())
    skipped: tuple[Note, ...] = field(default=())


def shard(options: ShardOptions, on_done: Progress = silent) -> Manifest:
    """Writes the split and returns its manifest; `on_done` hears of pictures as they are done, and of their total.

    Errors: ValueError or OSError naming the file and the mend. Finished shards stay, and the next call goes on.
    """
    source = ImageFolder(options.source)
    listing = source.scan()
    origin = source.describe() | {"samples": len(listing.samples), "listing_sha256": listing.sha256()}
    plan = plan_shards(len(listing.samples), options.samples_per_shard, options.seed, options.keep_order)
    jobs = [_job(options, source, number, [listing.samples[i] for i in ids]) for number, ids in enumerate(plan)]
    before = _manifest_before(options, origin)
    _refuse_foreign_shards(options, {job.name for job in jobs})
    jobs[0].part_path.parent.mkdir(parents=True, exist_ok=True)

    parts: dict[str, Part] = {}
    begun = [job for job in jobs if job.part_path.exists()]
    for job, part in zip(begun, map_ordered(finished_part, begun, options.processes), strict=True):
        if part is not None:
            parts[job.name] = part
            on_done(len(job.samples), len(listing.samples))
    to_do = [job for job in jobs if job.name not in parts]
    if to_do:
        # From here on the old manifest would promise what is being replaced.
        manifest_path(options.out, options.split).unlink(missing_ok=True)
        update_info(options.out, options.split, None)
    for job, part in zip(to_do, map_ordered(write_part, to_do, options.processes), strict=True):
        parts[job.name] = part
        on_done(len(job.samples), len(listing.samples))

    manifest = join_parts([parts[job.name] for job in jobs], listing, origin, options)
    if before is not None and before.shards == manifest.shards:
        manifest = dataclasses.replace(manifest, beton=before.beton)
    write_manifest(manifest)
    update_info(options.out, options.split, manifest)
    return manifest


def _job(options: ShardOptions, source: ImageFolder, number: int, samples: list[Sample]) -> ShardJob:
    name = shard_name(options.split, number)
    return ShardJob(source, options.out, options.split, name, tuple(samples), options.max_megapixels, options.on_error)


def _manifest_before(options: ShardOptions, origin: dict[str, Any]) -> Manifest | None:
    """The manifest already there. Errors: ValueError where it is of other pictures or options; it is kept."""
    path = manifest_path(options.out, options.split)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file: name a folder")
    if not path.exists():
        return None
    before = read_manifest(path)
    for what, old, new in (
        ("another source", before.source, origin),
        ("other options", before.options, options.lasting()),
    ):
        if old != new:
            changed = ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in new if old.get(k) != new.get(k))
            raise ValueError(
                f"{path} describes this split with {what} ({changed}): name another --out, or remove that file"
            )
    return before


def _refuse_foreign_shards(options: ShardOptions, planned: set[str]) -> None:
    found = {path.name for path in options.out.glob(f"{options.split}-[0-9][0-9][0-9][0-9][0-9][0-9].tar")}
    if extra := sorted(found - planned):
        raise ValueError(f"{options.out / extra[0]} is none of this split's {len(planned)} shards: remove it")


def finished_part(job: ShardJob) -> Part | None:
    """The record of the job's shard where it is done already, of these very pictures, and its bytes are intact."""
    try:
        body = json.loads(job.part_path.read_text(encoding="utf-8"))
        notes = {name: tuple(record_of(Note, note) for note in body[name]) for name in ("repaired", "skipped")}
        part = record_of(Part, body | notes | {"shard": record_of(ShardRecord, body["shard"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None  # no record, or a damaged one: the shard is simply written again
    refused = part.skipped and job.on_error == "fail"
    if refused or part.shard.name != job.name or part.digest != job.digest() or not is_intact(job.out, part.shard):
        return None
    return part


def write_part(job: ShardJob) -> Part:
    """Writes the job's shard, index and record. Errors: ValueError naming the picture and the mend."""
    repaired: list[Note] = []
    skipped: list[Note] = []
    labels: Counter[str] = Counter()
    digest = job.digest()  # before reading, so that a picture changed meanwhile does not pass as the old one

    def pictures() -> Iterator[tuple[Sample, bytes]]:
        for sample in job.samples:
            try:
                data, repair = prepare_picture(job.source.read(sample), job.max_megapixels)
            except PictureError as error:
                if job.on_error == "fail":
                    raise ValueError(
                        f"{job.source.root / sample.path}: {error}; mend or remove it, or leave out all such pictures "
                        "with --on-error skip"
                    ) from error
                skipped.append(Note(sample.key, f"{sample.path}: {error}"))
                continue
            if repair is not None:
                repaired.append(Note(sample.key, f"{sample.path}: {repair}"))
            labels[str(sample.label)] += 1
            yield sample, data

    record = write_tar(job.out / job.name, pictures())
    part = Part(digest, record, dict(labels), tuple(repaired), tuple(skipped))
    with atomic_file(job.part_path) as file:
        file.write(json.dumps(dataclasses.asdict(part), ensure_ascii=False).encode())
    return part


def join_parts(parts: list[Part], listing: Listing, origin: dict[str, Any], options: ShardOptions) -> Manifest:
    """Errors: ValueError where skipping left a class, or all, without pictures."""
    counts = [sum(part.labels.get(str(label), 0) for part in parts) for label in range(len(listing.classes))]
    if not all(counts):
        name = listing.classes[counts.index(0)]
        raise ValueError(f"class {name!r} has no picture that can be read: mend its pictures or remove the folder")
    return Manifest(
        split=options.split,
        classes=listing.classes,
        class_counts=tuple(counts),
        shards=tuple(part.shard for part in parts),
        source=origin,
        options=options.lasting(),
        repaired=tuple(note for part in parts for note in part.repaired),
        skipped=tuple(note for part in parts for note in part.skipped),
        folder=options.out,
    )


def summary(manifest: Manifest, seconds: float) -> str:
    """One line on what a manifest holds."""
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    return (
        f"{manifest.split}: {manifest.num_samples} pictures, {len(manifest.classes)} classes, "
        f"{len(manifest.shards)} shards, {megabytes:.1f} MB, {len(manifest.repaired)} repaired, "
        f"{len(manifest.skipped)} skipped; {seconds:.1f} s, {manifest.num_samples / seconds:.0f} images/s: "
        f"{manifest.path}"
    )
