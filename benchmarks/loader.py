"""Images a second of the project's readers beside the webdataset library, on the same tars, augmented for training.

Each contestant decodes whole pictures, crops and resizes as RandomResizedCrop does, flips, and gives uint8 batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Contestant, Row, check_output, circumstances_of, compare, finish, status_line, summarise
from benchmarks.samples import Source, sharded_samples
from data_prep.manifest import Manifest, read_manifest
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig, TrainLoader, open_split
from pipeline.data.order import layout_of
from pipeline.data.shards import ShardReader

SEED = 0
SHARDS_A_WORKER = 4  # of the temporary shards
# Levels of 0 to 255, a picture's mean. ffcv shrinks with INTER_AREA and a fast DCT, Pillow with an antialiased filter:
# on the 250 ImageNet pictures they were at most 7.2 apart; two pictures at least 32, two crops of one typically 55.
MAX_PICTURE_DIFFERENCE = 20.0
MAX_MEAN_DIFFERENCE = 20.0  # between random crops of the same pictures, on the mean of all

_SHUFFLE_SHARDS, _SHUFFLE_SAMPLES = 100, 1000  # the webdataset library's README


@dataclass(frozen=True)
class LoaderOptions:
    """images/s, CPU time an image and time to the first batch, of both readers and of the webdataset library."""

    manifest: Path | None = None
    """A split's *.manifest.json. None: imagenet-sample.tar of the folder that NOISYNN_SAMPLES names, repeated."""
    images: int = 2000
    """Pictures of a round: those of the first shards that hold so many."""
    image_size: int = 224
    batch: int = 64
    workers: int = 2
    """Processes (tars) or threads (.beton); 0 decodes in the process itself."""
    rounds: int = 5
    """Timed rounds of each contestant."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of the readers that resize with Pillow; torchvision's default. ffcv always takes INTER_AREA."""
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


@dataclass(frozen=True)
class Work:
    """What every contestant reads: the first `samples` of the manifest's order, which are `tars` in whole."""

    path: Path
    manifest: Manifest
    tars: tuple[Path, ...]
    samples: int
    options: LoaderOptions


Batches = Iterable[Sequence[Any]]  # of (images, labels, ...)


class Entrant(NamedTuple):
    """A loader to measure: how to open it, what it makes in an epoch, and its settings."""

    open: Callable[[], Batches]
    settings: str
    delivered: Callable[[Any], Delivered]


class Delivered(NamedTuple):
    """One epoch's output, as far as loaders with random crops of their own can be compared."""

    label_counts: np.ndarray  # int64 (classes,)
    mean_level: float  # of all pixels, 0 to 255
    shape: tuple[int, ...]  # of one picture, channels last
    by_id: Tensor | None  # uint8 (B, H, W, 3), samples 0 to B-1 at epoch 0; None where crops cannot be asked for


def measure_loaders(options: LoaderOptions, command: Sequence[str]) -> list[Row]:
    """Measures, writes and prints. Errors: ValueError, OSError naming the file or option and the mend."""
    path = check_output(options.output, "loader")
    circumstances = circumstances_of(command, options.note)
    with _source(options) as source, status_line() as on_turn:
        work = _work(source.manifest, options)
        on_turn("checking every picture's CRC")
        _check_pictures(work)
        conditions = _conditions(work, source)
        entrants = _entrants(work)
        rows = []
        with _epochs(entrants) as contestants:
            timings = compare(contestants, options.rounds, agree, on_turn)
            rows += summarise("loader", "an epoch", "images", contestants, timings)
        contestants = _first_batches(entrants)
        timings = compare(contestants, options.rounds, on_turn=on_turn)
        rows += summarise("loader", "first batch", "starts", contestants, timings)
    finish(rows, circumstances | {"conditions": conditions}, path)
    if work.manifest.beton is None:
        print(f"no .beton measured: `python -m data_prep beton {work.path.name}` would write one")
    return rows


@contextlib.contextmanager
def _source(options: LoaderOptions) -> Iterator[Source]:
    if options.manifest is not None:
        yield Source(options.manifest, f"the user's {options.manifest.name}")
        return
    processes = len(os.sched_getaffinity(0))
    with sharded_samples(options.images, SHARDS_A_WORKER * max(1, options.workers), processes) as source:
        yield source


def _work(path: Path, options: LoaderOptions) -> Work:
    manifest = read_manifest(path)
    tars, samples = [], 0
    for shard in manifest.shards:
        if samples >= options.images:
            break
        tars.append((manifest.folder / shard.name).resolve())
        samples += shard.samples
    if samples < options.batch:
        raise ValueError(f"--batch {options.batch} is larger than the {samples} pictures of a round: lower it")
    return Work(path, manifest, tuple(tars), samples, options)


def _check_pictures(work: Work) -> None:
    """Reads every picture once: a damaged tar is named before other libraries meet it, and the page cache is warm."""
    o = work.options
    manifest = dataclasses.replace(work.manifest, beton=None)
    reader = ShardReader(manifest, o.image_size, AugmentConfig(), SEED)
    for sample_id in range(work.samples):
        reader.read(sample_id)


def _conditions(work: Work, source: Source) -> dict[str, Any]:
    o = work.options
    names = ("image_size", "batch", "workers", "interpolation")
    return {name: getattr(o, name) for name in names} | {
        "pictures": source.pictures,
        "samples": work.samples,
        "shards": len(work.tars),
        "mean_bytes_in_tar": round(sum(tar.stat().st_size for tar in work.tars) / work.samples),
        "manifest_sha256": hashlib.sha256(work.path.read_bytes()).hexdigest(),
        "page_cache": "warm",
    }


def _entrants(work: Work) -> dict[str, Entrant]:
    """The peer first: ratios are to what a user would take instead."""
    o = work.options
    peer_workers = min(o.workers, len(work.tars))
    fewer = "" if peer_workers == o.workers else f" of {o.workers} (it needs a shard for each)"
    found = {
        "webdataset": Entrant(
            partial(_open_webdataset, work, peer_workers),
            f"webdataset library: shardshuffle={_SHUFFLE_SHARDS}, shuffle({_SHUFFLE_SAMPLES}), decode('pil'), "
            f"torchvision RandomResizedCrop and flip, uint8, batched in {peer_workers} persistent workers{fewer}; "
            "shuffles, decoder and batching as its README, persistent workers as the project's",
            partial(_delivered_by_webdataset, work),
        ),
        "tars": Entrant(
            partial(_open_project, work, "wds"),
            f"pipeline.data, format wds: Pillow, CRC of every picture checked, {o.workers} persistent workers",
            partial(_delivered_by_project, work),
        ),
    }
    if work.manifest.beton is not None:
        found["beton"] = Entrant(
            partial(_open_project, work, "ffcv"),
            f"pipeline.data, format ffcv, mode {work.manifest.beton.mode}: ffcv's decoder and INTER_AREA, "
            f"{max(1, o.workers)} threads",
            partial(_delivered_by_project, work),
        )
    return found


@contextlib.contextmanager
def _epochs(entrants: dict[str, Entrant]) -> Iterator[list[Contestant]]:
    """A round is an epoch by a loader that stays open, as in training; each epoch has other crops."""
    loaders = {name: entrant.open() for name, entrant in entrants.items()}
    try:
        yield [
            Contestant(
                name, partial(_count, loader), entrants[name].settings, partial(entrants[name].delivered, loader)
            )
            for name, loader in loaders.items()
        ]
    finally:
        for loader in loaders.values():
            _end_workers(loader)


def _end_workers(loader: Any) -> None:
    """The webdataset library's end with the last reference to it."""
    if isinstance(loader, TrainLoader):
        loader.close()


def _count(loader: Batches) -> int:
    return sum(len(batch[1]) for batch in loader)


def _first_batches(entrants: dict[str, Entrant]) -> list[Contestant]:
    """A round opens a loader, reads its index and waits for one batch; imports are done by then."""
    contestants = []
    for name, entrant in entrants.items():
        start = _Start(entrant.open)
        contestants.append(Contestant(name, start.round, entrant.settings, between=start.close))
    return contestants


class _Start:
    """Keeps what a round opened, so that closing it falls outside the clock."""

    def __init__(self, open_loader: Callable[[], Batches]) -> None:
        self._open = open_loader
        self._loader: Batches | None = None
        self._batches: Any = None

    def round(self) -> int:
        self._loader = self._open()
        self._batches = iter(self._loader)
        next(self._batches)
        return 1

    def close(self) -> None:
        self._batches = None
        _end_workers(self._loader)
        self._loader = None


def _open_project(work: Work, form: Literal["wds", "ffcv"]) -> TrainLoader:
    o = work.options
    config = DataConfig(train=work.path, format=form, image_size=o.image_size, workers=o.workers)
    reader = open_split(work.path, config, AugmentConfig(interpolation=o.interpolation), SEED)
    reader.labels = reader.labels[: work.samples]  # the loader's epoch is as long as the labels
    return TrainLoader(reader, layout_of(o.batch, o.batch, 0, 1), SEED, o.workers)


def _open_webdataset(work: Work, workers: int) -> Batches:
    try:
        import webdataset as wds
    except ImportError as error:
        raise ValueError(f"the webdataset library cannot be imported ({error}): run `make setup`") from error
    dataset = (
        wds.WebDataset([str(tar) for tar in work.tars], shardshuffle=_SHUFFLE_SHARDS)
        .shuffle(_SHUFFLE_SAMPLES)
        .decode("pil", only=("jpg", "jpeg", "png", "webp", "cls"))  # by default it would run pickled members
        .to_tuple("jpg;jpeg;png;webp", "cls")
        .map_tuple(_torchvision_transform(work.options), int)
        .batched(work.options.batch, partial=True)  # each worker would drop a part of its own
    )
    return wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def _torchvision_transform(options: LoaderOptions) -> Callable[[Any], Tensor]:
    """Pillow image -> uint8 (3, size, size), as this project's readers leave floats to the device."""
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(options.image_size, interpolation=InterpolationMode(options.interpolation)),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


def _delivered_by_project(work: Work, loader: TrainLoader) -> Delivered:
    """An epoch of the very loader to be timed. The training order drops n mod batch samples: the index counts them."""
    seen, total, labels = [], 0.0, np.zeros(len(work.manifest.classes), np.int64)
    for batch in loader:
        seen.append(batch.sample_ids.numpy())
        labels += np.bincount(batch.labels.numpy(), minlength=len(labels))
        total += _mean_level(batch.images) * len(batch.images)
    ids = np.concatenate(seen)
    dropped = np.setdiff1d(np.arange(work.samples), ids)
    if len(np.unique(ids)) != len(ids) or len(dropped) != work.samples % work.options.batch:
        raise ValueError(f"{work.path}: an epoch of {work.samples} samples gave {len(np.unique(ids))} different ones")
    labels += np.bincount(loader.reader.labels[dropped], minlength=len(labels))
    pictures = loader.reader.batch(np.arange(min(work.options.batch, work.samples)), epoch=0).images
    return Delivered(labels, total / len(ids), tuple(batch.images.shape[1:]), pictures)


def _delivered_by_webdataset(work: Work, loader: Batches) -> Delivered:
    count, total, labels = 0, 0.0, np.zeros(len(work.manifest.classes), np.int64)
    for images, batch_labels in loader:
        labels += np.bincount(np.asarray(batch_labels), minlength=len(labels))
        total += _mean_level(images) * len(images)
        count += len(images)
    return Delivered(labels, total / count, (*images.shape[2:], images.shape[1]), None)


def _mean_level(images: Tensor) -> float:
    if images.dtype != torch.uint8:
        raise ValueError(f"a loader gave {images.dtype} where uint8 was asked for")
    return images.sum(dtype=torch.int64).item() / images.numel()


def agree(one: Delivered, other: Delivered) -> str | None:
    """Same labels as often, same form, like brightness; where both can be asked by sample id, the same pictures."""
    if one.shape != other.shape:
        return f"pictures of {one.shape} and of {other.shape}"
    if not np.array_equal(one.label_counts, other.label_counts):
        label = int((one.label_counts != other.label_counts).argmax())
        return f"class {label} comes {one.label_counts[label]} times and {other.label_counts[label]} times"
    if abs(one.mean_level - other.mean_level) > MAX_MEAN_DIFFERENCE:
        return f"mean levels of {one.mean_level:.1f} and {other.mean_level:.1f}"
    if one.by_id is not None and other.by_id is not None:
        difference = (one.by_id.to(torch.int16) - other.by_id.to(torch.int16)).abs().float().mean((1, 2, 3))
        if (worst := difference.max().item()) > MAX_PICTURE_DIFFERENCE:
            return f"sample {int(difference.argmax())} differs by {worst:.1f} levels on the mean"
    return None
