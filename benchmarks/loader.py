"""Images a second of the project's loaders beside those that people use, on the same pictures, augmented for training.

Each contestant crops and resizes as RandomResizedCrop does, flips, and gives uint8 batches. Beside that: time to the
first batch, memory, what of the decoders' own rate reaches Python, and what the plan of an epoch costs.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from benchmarks.harness import (
    Contestant,
    Row,
    append_rows,
    check_output,
    circumstances_of,
    compare,
    print_circumstances,
    print_parts,
    status_line,
    summarise,
)
from benchmarks.loader_contestants import SEED, Batches, Entrant, Work, agree, project_entrants
from benchmarks.loader_decode import decode_contestants, print_share
from benchmarks.loader_peers import PEERS, find_peers, peer_entrants, versions_of, write_formats
from benchmarks.loader_plan import plan_contestants, plan_memory
from benchmarks.memory import MemoryRow, peak_in_new_process, print_memory
from benchmarks.samples import Source, sharded_samples
from data_prep.manifest import Manifest, read_manifest
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig, open_split

SHARDS_A_WORKER = 4  # of the temporary shards

Part = Literal["epoch", "first_batch", "memory", "decode", "plan"]
Name = Literal[
    "webdataset",
    "webdataset_io",
    "image_folder",
    "image_folder_io",
    "timm",
    "ffcv",
    "streaming",
    "litdata",
    "spdl",
    "tars",
    "restart_tars",
    "beton",
]


@dataclass(frozen=True)
class LoaderOptions:
    """images/s, CPU time an image, memory and time to the first batch, of this project's loaders and of its peers."""

    manifest: Path | None = None
    """A split's *.manifest.json. None: imagenet-sample.tar of the folder that NOISYNN_SAMPLES names, repeated."""
    pictures: Literal["original", "256"] = "original"
    """Of the sample pictures: their own sizes, or the shorter side reduced to 256 pixels."""
    images: int = 2000
    """Pictures of a round: those of the first shards that hold so many."""
    image_size: int = 224
    batch: int = 64
    workers: int = 2
    """Threads or processes, as the loader has them; where it has processes, 0 decodes in the main one."""
    rounds: int = 5
    """Timed rounds of each contestant."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """torchvision's default is bilinear. FFCV always takes INTER_AREA."""
    parts: tuple[Part, ...] = get_args(Part)
    """What is measured: epoch, first_batch, memory, decode, plan."""
    contestants: tuple[Name, ...] = get_args(Name)
    """Who takes part, ratios are to the first: webdataset, image_folder (Pillow; with _io torchvision's decoder), timm,
    ffcv, streaming, litdata, spdl; tars, restart_tars (with restart markers), beton are this project's."""
    note: str = ""
    """Kept in each row, such as `2 CPU cores, shared`."""
    output: Path | None = None
    """JSON lines to add to; benchmarks/results/loader.jsonl if None."""

    def __post_init__(self) -> None:
        for name in ("images", "image_size", "batch", "rounds"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers}: at least 0")
        for name in ("parts", "contestants"):
            if len(set(given := getattr(self, name))) < len(given):
                raise ValueError(f"--{name} {' '.join(given)}: each once")
        if self.manifest is not None and self.pictures != "original":
            raise ValueError(
                f"--pictures {self.pictures} is of the sample pictures: with --manifest, give one of shards that were "
                f"written with `--short-side {self.pictures}`"
            )


def measure_loaders(options: LoaderOptions, command: Sequence[str]) -> list[Row | MemoryRow]:
    """Measures, writes and prints. Errors: ValueError, OSError naming the file or option and the mend."""
    path = check_output(options.output, "loader")
    circumstances = circumstances_of(command, options.note)
    rows: list[Row] = []
    memory: list[MemoryRow] = []
    with _one_thread_an_operator(), status_line() as on_turn:

        def measure(part: str, unit: str, contestants: list[Contestant], agreed: Any = None) -> None:
            timings = compare(contestants, options.rounds, agreed, on_turn)
            rows.extend(summarise("loader", part, unit, contestants, timings))

        conditions: dict[str, Any] = {}
        if set(options.parts) != {"plan"}:
            with _prepared(options, on_turn) as (work, conditions):
                _measure_loading(options, work, measure, memory, on_turn)
        if "plan" in options.parts:
            measure("plan of an epoch", "plans", plan_contestants())
            memory += plan_memory()
    results: list[Row | MemoryRow] = [*rows, *memory]
    append_rows(path, [row.to_json(circumstances | {"conditions": conditions}) for row in results])
    print_parts(rows)
    print_memory(memory)
    print_share(rows, options.workers)
    print_circumstances(options.rounds, circumstances)
    print(f"{len(results)} rows, with versions, commit and command, added to {path}")
    return results


def _measure_loading(
    options: LoaderOptions,
    work: Work,
    measure: Callable[..., None],
    memory: list[MemoryRow],
    on_turn: Callable[[str], None],
) -> None:
    entrants = _entrants(work, options.contestants)
    if not entrants:
        raise ValueError(f"--contestants {' '.join(options.contestants)}: none of them can be measured here; add tars")
    if "epoch" in options.parts:
        with _epochs(entrants) as contestants:
            measure("an epoch", "images", contestants, agree)
    if "first_batch" in options.parts:
        measure("first batch", "starts", _first_batches(entrants))
    if "memory" in options.parts:
        for name, entrant in entrants.items():
            on_turn(f"{name}: memory")
            peak = peak_in_new_process(partial(_epoch_to_watch, work, name))
            memory.append(MemoryRow("loader", "memory", name, entrant.settings, *peak))
    if "decode" in options.parts:
        with decode_contestants(work) as contestants:
            if contestants:
                measure("decode alone", "images", contestants)


@contextlib.contextmanager
def _one_thread_an_operator() -> Iterator[None]:
    """Loaders share the cores out among pictures; torch's operators on top of that would fight for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _prepared(options: LoaderOptions, on_turn: Callable[[str], None]) -> Iterator[tuple[Work, dict[str, Any]]]:
    """Everything on disk that the contestants read, and what it is."""
    peers, missing = find_peers([name for name in options.contestants if name in PEERS])
    processes = len(os.sched_getaffinity(0))
    with _source(options, processes) as source, tempfile.TemporaryDirectory(prefix="noisynn-benchmark-") as scratch:
        work = _work(source, options, Path(scratch))
        on_turn("checking every picture's CRC")
        _check_pictures(work)
        on_turn("writing the peers' formats")
        write_formats(work, peers, processes)
        for line in missing:
            print(line, file=sys.stderr)
        yield work, _conditions(work, source) | {"versions_of_peers": versions_of(peers)}


@contextlib.contextmanager
def _source(options: LoaderOptions, processes: int) -> Iterator[Source]:
    if options.manifest is not None:
        yield Source(options.manifest, f"the user's {options.manifest.name}")
        return
    short_side = None if options.pictures == "original" else int(options.pictures)
    with sharded_samples(options.images, SHARDS_A_WORKER * max(1, options.workers), processes, short_side) as source:
        yield source


def _work(source: Source, options: LoaderOptions, scratch: Path) -> Work:
    manifest = read_manifest(source.manifest)
    tars, samples = _first_shards(manifest, options.images)
    if samples < options.batch:
        raise ValueError(f"--batch {options.batch} is larger than the {samples} pictures of a round: lower it")
    shared = {name: getattr(options, name) for name in ("image_size", "batch", "workers", "interpolation")}
    return Work(source.manifest, source.restart_manifest, tars, samples, scratch, **shared)


def _first_shards(manifest: Manifest, images: int) -> tuple[tuple[Path, ...], int]:
    """(tars, samples in them) of the first shards that hold so many."""
    tars, samples = [], 0
    for shard in manifest.shards:
        if samples >= images:
            break
        tars.append((manifest.folder / shard.name).resolve())
        samples += shard.samples
    return tuple(tars), samples


def _check_pictures(work: Work) -> None:
    """Reads every picture once: a damaged tar is named before other libraries meet it, and the page cache is warm."""
    for manifest in filter(None, (work.manifest, work.restart_manifest)):
        reader = open_split(str(manifest), DataConfig(train=str(manifest)), AugmentConfig(), SEED)
        for sample_id in range(work.samples):
            reader.read(sample_id)


def _conditions(work: Work, source: Source) -> dict[str, Any]:
    names = ("image_size", "batch", "workers", "interpolation")
    sizes = {"mean_bytes_in_tar": work.tars}
    if work.restart_manifest is not None:
        sizes["mean_bytes_in_restart_tar"] = _first_shards(read_manifest(work.restart_manifest), work.samples)[0]
    return {
        **{name: getattr(work, name) for name in names},
        "pictures": source.pictures,
        "samples": work.samples,
        "shards": len(work.tars),
        **{name: round(sum(tar.stat().st_size for tar in tars) / work.samples) for name, tars in sizes.items()},
        "manifest_sha256": hashlib.sha256(work.manifest.read_bytes()).hexdigest(),
        "page_cache": "warm",
    }


def _entrants(work: Work, names: Sequence[str]) -> dict[str, Entrant]:
    """Those of the names that are there, in their order: ratios are to the first."""
    there = peer_entrants(work, find_peers([name for name in names if name in PEERS])[0]) | project_entrants(work)
    return {name: there[name] for name in names if name in there}


@contextlib.contextmanager
def _epochs(entrants: dict[str, Entrant]) -> Iterator[list[Contestant]]:
    """A round is an epoch by a loader that stays open, as in training; each epoch has other crops."""
    with contextlib.ExitStack() as stack:
        contestants = []
        for name, entrant in entrants.items():
            loader = entrant.open()
            stack.callback(entrant.close, loader)
            output = partial(entrant.delivered, loader)
            contestants.append(Contestant(name, partial(_count, loader), entrant.settings, output))
        yield contestants


def _count(loader: Batches) -> int:
    return sum(len(batch[1]) for batch in loader)


def _epoch_to_watch(work: Work, name: str) -> Callable[[], int]:
    """Opening a loader and reading an epoch. What it imports is in memory before: opened once, it has imported it."""
    torch.set_num_threads(1)
    entrant = _entrants(work, (name,))[name]
    entrant.close(entrant.open())

    def epoch() -> int:
        loader = entrant.open()
        images = _count(loader)
        entrant.close(loader)
        return images

    return epoch


def _first_batches(entrants: dict[str, Entrant]) -> list[Contestant]:
    """A round opens a loader, reads its index and waits for one batch; imports are done by then."""
    contestants = []
    for name, entrant in entrants.items():
        start = _Start(entrant)
        contestants.append(Contestant(name, start.round, entrant.settings, between=start.close))
    return contestants


class _Start:
    """Keeps what a round opened, so that closing it falls outside the clock."""

    def __init__(self, entrant: Entrant) -> None:
        self._entrant = entrant
        self._opened: tuple[Batches, Any] | None = None

    def round(self) -> int:
        loader = self._entrant.open()
        batches = iter(loader)
        self._opened = loader, batches
        next(batches)
        return 1

    def close(self) -> None:
        assert self._opened is not None
        loader, batches = self._opened
        self._opened = None
        if hasattr(batches, "close"):  # a generator ends what it has begun while that can still be ended
            batches.close()
        self._entrant.close(loader)
        del loader, batches
        gc.collect()  # what ends with a cycle of references ends here, not in another's round
