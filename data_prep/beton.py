"""A split's pictures -> .beton, in FFCV's format, and the index of their CRCs beside it.

From the shards of a manifest, or straight from a source in the order that `shard` would give it: both make the same
file. Processes prepare the pictures; this one alone writes, so a process that dies is an error and nothing waits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Literal

import numpy as np
import tyro

from data_prep.beton_format import BetonFile
from data_prep.beton_pictures import Done, Form, Pictures, Run, pictures_of_shards, pictures_of_source
from data_prep.distribute import lasting_options, origin_of
from data_prep.finalize import Plan
from data_prep.images import DEFAULT_QUALITY, PictureOptions
from data_prep.index_records import pack_records
from data_prep.manifest import (
    BetonRecord,
    Manifest,
    Note,
    atomic_file,
    manifest_path,
    read_manifest,
    remove_orphans,
    write_manifest,
)
from data_prep.plan import plan_shards
from data_prep.sources.choose import open_source
from data_prep.sources.names import read_class_names
from data_prep.storage import local_path
from data_prep.tar_shards import file_sha256
from data_prep.workers import Progress, map_ordered, silent


@dataclass(frozen=True)
class BetonOptions:
    """Write an FFCV .beton of a manifest's samples, read from its shards; or of a source's, without shards."""

    manifest: tyro.conf.Positional[Path | None] = None
    """The split's *.manifest.json. Instead of it: --source and --out."""
    source: str | None = None
    """What `shard --source` takes. The .beton holds the samples that `shard` would write, in the same order."""
    out: str | None = None
    """Folder to write into. Where it holds the split's shards already, the .beton joins their manifest."""
    split: str = "train"
    """Name of the split; of --source."""
    devkit: str | None = None
    """As for `shard`; of --source."""
    classes: str | None = None
    """As for `shard`; of --source."""
    class_names: str | None = None
    """As for `shard`; of --source."""
    samples_per_shard: int = 1000
    """As for `shard`, for the order depends on it where Parquet files are read; of --source."""
    seed: int = 0
    """Seed of the order, as for `shard`; of --source."""
    keep_order: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep the source's order instead of shuffling; of --source."""
    max_megapixels: float = PictureOptions().max_megapixels
    """As for `shard`: pictures whose header declares more are refused; of --source."""
    mode: Literal["jpg", "raw", "proportion"] = "jpg"
    """jpg keeps JPEGs as they are; raw stores pixels; proportion half of each, chosen by sample id."""
    max_resolution: int | None = None
    """Longest side in pixels; larger pictures are reduced to it. None keeps all sizes."""
    jpeg_quality: int | None = None
    """Quality of pictures that are reduced and stored as JPEG (90 if None)."""
    processes: int = 2
    """Local processes that decode and encode; the result does not depend on it."""

    def __post_init__(self) -> None:
        self._check_origin()
        if self.max_resolution is not None and not 1 <= self.max_resolution <= 65500:
            raise ValueError(f"--max-resolution {self.max_resolution}: must be 1 to 65500")
        if self.jpeg_quality is not None:
            if not 1 <= self.jpeg_quality <= 100:
                raise ValueError(f"--jpeg-quality {self.jpeg_quality}: must be 1 to 100")
            if self.mode == "raw" or self.max_resolution is None:
                raise ValueError(
                    "--jpeg-quality would change nothing: only pictures that --max-resolution reduces are encoded "
                    "anew, and raw stores no JPEG"
                )
        if self.processes < 1:
            raise ValueError(f"--processes {self.processes}: must be at least 1")

    def _check_origin(self) -> None:
        if (self.manifest is None) == (self.source is None):
            raise ValueError("name either a manifest, whose shards are read, or --source and --out")
        if self.manifest is not None:
            for name in SOURCE_OPTIONS:
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"--{name.replace('_', '-')} would change nothing: it goes with --source alone")
        elif self.out is None:
            raise ValueError("--source needs --out: name the folder to write into")
        elif local_path(self.out) is None:
            raise ValueError(f"--out {self.out}: ffcv reads a .beton from a disk alone: name a folder, copy it later")
        if not self.split or not all(c.isascii() and (c.isalnum() or c in "_-") for c in self.split):
            raise ValueError(f"--split {self.split!r}: use letters, digits, _ and - only")
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard {self.samples_per_shard}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must be 0 or more")

    @property
    def form(self) -> Form:
        encodes = self.mode != "raw" and self.max_resolution is not None
        return Form(self.mode, self.max_resolution, (self.jpeg_quality or DEFAULT_QUALITY) if encodes else None)


SOURCE_OPTIONS = (
    "out",
    "split",
    "devkit",
    "classes",
    "class_names",
    "samples_per_shard",
    "seed",
    "keep_order",
    "max_megapixels",
)


@dataclass(frozen=True)
class _Work:
    """What is to be written, and what is there of it."""

    manifest: Manifest  # the split's, without a .beton
    before: Manifest | None  # as it lies in the folder
    pictures: Pictures


def write_beton(options: BetonOptions, on_done: Progress = silent) -> Manifest:
    """Writes `<split>.beton` and its index beside the manifest, reads it back, and returns the manifest with it.

    Does nothing where the same file is there already. `on_done` hears of samples as they are written, and again as they
    are read back, out of twice their number.
    Errors: ValueError or OSError (ChildProcessError where a process died); nothing is then left under the final name.
    """
    if importlib.util.find_spec("ffcv") is None:
        raise ValueError(
            "ffcv is not installed, and nothing here could read the file: run `make setup`; it needs Debian's "
            "libopencv-dev libturbojpeg0-dev pkg-config"
        )
    work = _of_shards(options) if options.source is None else _of_source(options)
    folder, split = work.manifest.folder, work.manifest.split
    if work.before is not None and _is_there(work.before, options.form):
        return work.before
    folder.mkdir(parents=True, exist_ok=True)
    remove_orphans(folder, f"{split}.beton")
    _retire(work.before)
    with atomic_file(folder / f"{split}.beton") as file:
        written = BetonFile(file, f"{split}.beton", work.pictures.labels)
        repaired = _write(written, options, work.pictures, on_done)
        record = _record(written, file, options, on_done)
        # The index first: without it nobody may read the .beton.
        with atomic_file(folder / record.index_name) as index_file:
            index_file.write(pack_records(written.index))
    manifest = dataclasses.replace(work.manifest, beton=record)
    if not manifest.shards:
        manifest = dataclasses.replace(manifest, repaired=tuple(repaired))
    write_manifest(manifest)
    return manifest


def _record(written: BetonFile, file: IO[bytes], options: BetonOptions, on_done: Progress) -> BetonRecord:
    """Reads the file back; returns what the manifest says of it."""
    sha256 = written.read_back(on_done)
    return BetonRecord(
        name=written.name,
        samples=len(written.index),
        bytes=os.fstat(file.fileno()).st_size,
        sha256=sha256,
        index_sha256=hashlib.sha256(pack_records(written.index)).hexdigest(),
        mode=options.mode,
        max_resolution=options.max_resolution,
        jpeg_quality=options.form.jpeg_quality,
        tables_sha256=hashlib.sha256(b"".join(values.tobytes() for _, values in written.tables)).hexdigest(),
    )


def _of_shards(options: BetonOptions) -> _Work:
    assert options.manifest is not None
    before = read_manifest(options.manifest)
    if not before.shards:
        raise ValueError(f"{before.path} has no shards to read, only a .beton: write it again from its --source")
    return _Work(dataclasses.replace(before, beton=None), before, pictures_of_shards(before, options.form))


def _of_source(options: BetonOptions) -> _Work:
    assert options.source is not None and options.out is not None
    source = open_source(options.source, options.devkit, options.classes)
    listing = source.scan()
    shards = plan_shards(len(listing), options.samples_per_shard, options.seed, options.keep_order, listing.runs)
    class_names = listing.class_names
    if options.class_names is not None:
        class_names = read_class_names(options.class_names, listing.classes)
    picture = PictureOptions(max_megapixels=options.max_megapixels)
    manifest = Manifest(
        split=options.split,
        classes=listing.classes,
        class_counts=tuple(np.bincount(listing.labels, minlength=len(listing.classes)).tolist()),
        shards=(),
        source=origin_of(source, listing),
        options=lasting_options(options.samples_per_shard, options.seed, options.keep_order, picture),
        class_names=class_names,
        folder=Path(options.out),
    )
    before = _manifest_there(manifest, len(shards))
    if before is not None:
        manifest = dataclasses.replace(before, beton=None)
    return _Work(manifest, before, pictures_of_source(source, listing, shards, options.form, options.max_megapixels))


def _manifest_there(wanted: Manifest, shards: int) -> Manifest | None:
    """The folder's own manifest of the same samples. Errors: ValueError where it is of others; it is kept."""
    path = manifest_path(wanted.folder, wanted.split)
    if not path.is_file():
        return None
    before = read_manifest(path)
    plan = Plan(wanted.split, shards, wanted.source, wanted.options, wanted.classes, wanted.class_names)
    plan.refuse_other(before.source, before.options, str(path))
    if before.skipped:
        raise ValueError(
            f"{path} leaves out {len(before.skipped)} pictures of the source: write the .beton of its shards, with "
            f"`python -m data_prep beton {path}`"
        )
    return before


def _is_there(before: Manifest, form: Form) -> bool:
    record = before.beton
    if record is None or (record.mode, record.max_resolution, record.jpeg_quality) != form:
        return False
    files = ((record.name, record.sha256), (record.index_name, record.index_sha256))
    paths = [(before.folder / name, sha256) for name, sha256 in files]
    return all(path.is_file() and file_sha256(path) == sha256 for path, sha256 in paths)


def _retire(before: Manifest | None) -> None:
    """No manifest must describe the file that is about to be replaced, not for a moment."""
    if before is None or before.beton is None:
        return
    if before.shards:
        write_manifest(dataclasses.replace(before, beton=None))
    else:
        before.path.unlink()


def _write(written: BetonFile, options: BetonOptions, pictures: Pictures, on_done: Progress) -> list[Note]:
    """Fills the file; returns what was repaired."""
    # JPEGs of shards that pass through are only read: other processes would only copy the bytes once more.
    passing = options.source is None and options.mode == "jpg" and options.max_resolution is None
    processes = 1 if passing else options.processes
    repaired: list[Note] = []
    done: Done
    for done in map_ordered(partial(_store, form=options.form), pictures, processes):
        for stored in done.stored:
            written.add(stored)
            on_done(1, len(stored.payload), 2 * len(pictures.labels))
        repaired += done.repaired
    written.finish()
    return repaired


def _store(run: Run, form: Form) -> Done:
    return run.store(form)
