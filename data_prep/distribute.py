"""A split's shards over processes and tasks: skips what is done, and gives the same bytes however it is spread.

Each task plans the whole split by itself, for the plan is a pure function of listing and options, and writes each
`num_tasks`-th shard with a record beside it. `finalize` joins the records.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, overload

import tyro

from data_prep.finalize import PLAN_NAME, Plan, finalize_split, read_plan, retire_manifest
from data_prep.images import PictureOptions
from data_prep.manifest import MANIFEST_SUFFIX, Manifest, parse_manifest
from data_prep.parts import Part, ShardJob, finished_part, part_name, parts_folder, write_part
from data_prep.plan import plan_shards, shard_name, task_of
from data_prep.restart_markers import rewriter
from data_prep.sources import Listing, Source
from data_prep.sources.choose import open_source
from data_prep.storage import Folder, open_folder
from data_prep.tasks import Task, task_from
from data_prep.workers import Progress, map_ordered, silent


@dataclass(frozen=True)
class ShardOptions:
    """Write WebDataset tars, an index for each, and the manifest. Run again after an interruption, it goes on."""

    source: str
    """A folder with one folder of pictures a class; ILSVRC2012_img_train.tar; ILSVRC2012_img_val.tar (with --devkit);
    Parquet files (a folder or a pattern of them); a *.manifest.json. Each may be a URL that fsspec reads."""
    out: str
    """Folder to write into, or a URL; it may hold other splits."""
    split: str = "train"
    """Name of the split: names the shards and the manifest."""
    devkit: str | None = None
    """ILSVRC2012_devkit_t12.tar.gz, or the folder it was unpacked to: the labels of ILSVRC2012_img_val.tar."""
    classes: str | None = None
    """Text file with one class a line, in the order of the labels, for Parquet files that hold numbers alone."""
    class_names: str | None = None
    """Readable names: lines `<class> <name>` (LOC_synset_mapping.txt), or JSON (imagenet_class_index.json)."""
    samples_per_shard: int = 1000
    """Pictures in each shard but the last."""
    seed: int = 0
    """Seed of the order, in which each shard mixes the classes."""
    keep_order: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep the source's order (class by class) instead of shuffling."""
    picture: Annotated[PictureOptions, tyro.conf.arg(name="")] = field(default_factory=PictureOptions)
    restart_markers: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Rewrite JPEGs without loss, with restart markers: the loader then decodes little more than the crop that it
    wants. They stay plain JPEGs of the same pixels, some 3 % larger; progressive and odd ones stay as they are."""
    on_error: Literal["fail", "skip"] = "fail"
    """At a picture that cannot be read: stop, or leave it out and list it in the manifest."""
    processes: int = 2
    """Local processes; the result does not depend on it."""
    task: int | None = None
    """Which of --num-tasks this is, from 0; from SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX where they are set."""
    num_tasks: int | None = None
    """Tasks that share the split; each writes its own shards, and `finalize` joins them. From a Slurm array if None."""

    def __post_init__(self) -> None:
        if not self.split or not all(c.isascii() and (c.isalnum() or c in "_-") for c in self.split):
            raise ValueError(f"--split {self.split!r}: use letters, digits, _ and - only")
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard {self.samples_per_shard}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must be 0 or more")
        if self.processes < 1:
            raise ValueError(f"--processes {self.processes}: must be at least 1")

    def lasting(self) -> dict[str, Any]:
        """The options that the result depends on."""
        return lasting_options(
            self.samples_per_shard, self.seed, self.keep_order, self.picture, restart_markers=self.restart_markers
        )


def lasting_options(
    samples_per_shard: int, seed: int, keep_order: bool, picture: PictureOptions, restart_markers: bool = False
) -> dict[str, Any]:
    """What a manifest says of how its samples were ordered and made."""
    order = {"samples_per_shard": samples_per_shard, "seed": seed, "keep_order": keep_order}
    # Left out where it is off, as in manifests from before there was such an option.
    return order | dataclasses.asdict(picture) | ({"restart_markers": True} if restart_markers else {})


def origin_of(source: Source, listing: Listing) -> dict[str, Any]:
    """What a manifest says of its source."""
    return source.describe() | {"samples": len(listing), "listing_sha256": listing.sha256()}


def shard(options: ShardOptions, on_done: Progress = silent) -> Manifest | Task:
    """Writes the split and returns its manifest; or one task's shards, and returns which task it was.

    `on_done` hears of pictures as they are done. Errors: ValueError or OSError naming the file and the mend. Finished
    shards stay, and the next call goes on.
    """
    task = task_from(options.task, options.num_tasks)
    if options.restart_markers:
        rewriter()  # refuses before anything is read
    folder = open_folder(options.out)
    source = open_source(str(options.source), options.devkit, options.classes)
    listing = source.scan()
    plan = plan_shards(len(listing), options.samples_per_shard, options.seed, options.keep_order, listing.runs)
    wanted = Plan(
        split=options.split,
        shards=len(plan),
        source=origin_of(source, listing),
        options=options.lasting(),
        classes=listing.classes,
        class_names=_class_names(options, listing),
    )
    _refuse_another_manifest(folder, wanted)
    _refuse_foreign_shards(folder, wanted)
    _claim(folder, wanted)
    own = [number for number in range(len(plan)) if task_of(number, task.count) == task.index]
    jobs = _Jobs(options, source, folder, listing, [(shard_name(options.split, n), plan[n]) for n in own])
    _write_missing(jobs, options, on_done)
    return task if task.count > 1 else finalize_split(folder, options.split)


@dataclass(frozen=True)
class _Jobs(Sequence[ShardJob]):
    """The jobs of these shards, each made when it is asked for: a million samples at once would be 100 MB more."""

    options: ShardOptions
    source: Source
    folder: Folder
    listing: Listing
    planned: list[tuple[str, Any]]  # (name, indices into the listing)

    def __len__(self) -> int:
        return len(self.planned)

    @overload
    def __getitem__(self, index: int) -> ShardJob: ...
    @overload
    def __getitem__(self, index: slice) -> _Jobs: ...
    def __getitem__(self, index: int | slice) -> ShardJob | _Jobs:
        if isinstance(index, slice):
            return dataclasses.replace(self, planned=self.planned[index])
        name, indices = self.planned[index]
        samples = tuple(self.listing.sample(i) for i in indices.tolist())
        options = self.options
        return ShardJob(
            self.source,
            self.folder,
            options.split,
            name,
            samples,
            options.picture,
            options.on_error,
            options.restart_markers,
        )

    def only(self, names: set[str]) -> _Jobs:
        return dataclasses.replace(self, planned=[(name, ids) for name, ids in self.planned if name in names])


def _write_missing(jobs: _Jobs, options: ShardOptions, on_done: Progress) -> None:
    total = sum(len(indices) for _, indices in jobs.planned)
    recorded = {
        name.rpartition("/")[2].removesuffix(".json") for name in jobs.folder.names(part_name(options.split, "*"))
    }
    begun = jobs.only(recorded)
    done: set[str] = set()
    for (name, indices), part in zip(begun.planned, map_ordered(finished_part, begun, options.processes), strict=True):
        if part is not None:
            done.add(name)
            on_done(len(indices), part.shard.bytes, total)
    missing = jobs.only({name for name, _ in jobs.planned} - done)
    if len(missing):
        # From here on the old manifest would promise what is being replaced.
        retire_manifest(jobs.folder, options.split)
    written: Part
    for (_, indices), written in zip(missing.planned, map_ordered(write_part, missing, options.processes), strict=True):
        on_done(len(indices), written.shard.bytes, total)


def _class_names(options: ShardOptions, listing: Listing) -> tuple[str, ...]:
    if options.class_names is None:
        return listing.class_names
    from data_prep.sources.names import read_class_names

    return read_class_names(options.class_names, listing.classes)


def _refuse_another_manifest(folder: Folder, wanted: Plan) -> None:
    """Errors: ValueError where the manifest already there is of other pictures or options; it is kept."""
    name = f"{wanted.split}{MANIFEST_SUFFIX}"
    if folder.size(name) is not None:
        before = parse_manifest(folder.read(name), folder.where(name), Path())
        wanted.refuse_other(before.source, before.options, folder.where(name))


def _refuse_foreign_shards(folder: Folder, wanted: Plan) -> None:
    planned = {shard_name(wanted.split, number) for number in range(wanted.shards)}
    found = folder.names(f"{wanted.split}-[0-9][0-9][0-9][0-9][0-9][0-9].tar")
    if extra := sorted(set(found) - planned):
        raise ValueError(f"{folder.where(extra[0])} is none of this split's {wanted.shards} shards: remove it")


def _claim(folder: Folder, wanted: Plan) -> None:
    """Writes the plan, once; tasks and later runs find it. Errors: ValueError where another plan was begun here."""
    name = f"{parts_folder(wanted.split)}/{PLAN_NAME}"
    with folder.locked():
        before = read_plan(folder, wanted.split)
        if before is not None:
            wanted.refuse_other(before.source, before.options, folder.where(name))
        if before != wanted:
            with folder.file(name) as file:
                file.write(json.dumps(dataclasses.asdict(wanted), indent=1, ensure_ascii=False).encode())
