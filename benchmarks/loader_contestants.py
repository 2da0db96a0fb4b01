"""What a loader to be measured is, what it must deliver, and this project's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.manifest import BetonRecord, read_manifest
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig, TrainLoader, open_split
from pipeline.data.order import Order, layout_of
from pipeline.data.reader import PictureReader

SEED = 0
# Levels of 0 to 255, a picture's mean, where a .beton holds pictures that were encoded anew; two pictures are at least
# 32 apart on the 250 of ImageNet, two crops of one typically 55.
MAX_PICTURE_DIFFERENCE = 20.0
MAX_MEAN_DIFFERENCE = 20.0  # between random crops of the same pictures, on the mean of all

_JPEG = b"\xff\xd8"


@dataclass(frozen=True)
class Work:
    """What every contestant reads: the first `samples` of the manifest's order, which are `tars` in whole."""

    manifest: Path
    restart_manifest: Path | None  # of the same samples with restart markers
    tars: tuple[Path, ...]
    samples: int
    scratch: Path  # for the formats of other libraries
    image_size: int
    batch: int
    workers: int
    interpolation: Literal["bilinear", "bicubic"]

    @property
    def dropped(self) -> int:
        """Samples of an epoch that fill no batch."""
        return self.samples % self.batch


Batches = Iterable[Sequence[Any]]  # of (images, labels, ...)


class Delivered(NamedTuple):
    """One epoch's output, as far as loaders with random crops of their own can be compared."""

    label_counts: np.ndarray  # int64 (classes,)
    dropped: int  # samples that the epoch leaves out
    mean_level: float  # of all pixels, 0 to 255
    shape: tuple[int, ...]  # of one picture, channels last
    by_id: Tensor | None = None  # uint8 (B, H, W, 3), samples 0 to B-1 at epoch 0; None where crops cannot be asked for
    encoded_anew: bool = False  # the pictures are near those of the others, not the same


def _leave(loader: Any) -> None: ...


class Entrant(NamedTuple):
    """A loader to measure."""

    open: Callable[[], Batches]
    settings: str
    delivered: Callable[[Any], Delivered]
    close: Callable[[Any], None] = _leave
    """Ends what outlives the last reference to it."""


def project_entrants(work: Work) -> dict[str, Entrant]:
    """This project's loaders, as far as their files are there."""
    threads = max(1, work.workers)
    how = f"{threads} native threads, CRC of every picture checked, antialiased as Pillow resizes, uint8 (B, H, W, 3)"
    found = {"tars": _project_entrant(work, work.manifest, "wds", f"pipeline.data, format wds: {how}")}
    if work.restart_manifest is not None:
        settings = f"pipeline.data, format wds, shards of `data_prep shard --restart-markers`: {how}"
        found["restart_tars"] = _project_entrant(work, work.restart_manifest, "wds", settings)
    if (beton := read_manifest(work.manifest).beton) is not None:
        settings = f"pipeline.data, format ffcv, mode {beton.mode}: {how}"
        found["beton"] = _project_entrant(work, work.manifest, "ffcv", settings, encodes_anew(beton))
    return found


def encodes_anew(beton: BetonRecord) -> bool:
    return beton.mode != "jpg" or beton.max_resolution is not None


def _project_entrant(
    work: Work, manifest: Path, form: Literal["wds", "ffcv"], settings: str, encoded_anew: bool = False
) -> Entrant:
    return Entrant(
        partial(open_project, work, manifest, form),
        settings,
        partial(_delivered_by_project, work, encoded_anew),
        _close_project,
    )


def open_project(work: Work, manifest: Path, form: Literal["wds", "ffcv"]) -> TrainLoader:
    config = DataConfig(train=str(manifest), format=form, image_size=work.image_size, workers=work.workers)
    reader = open_split(str(manifest), config, AugmentConfig(interpolation=work.interpolation), SEED)
    loader = TrainLoader(reader, layout_of(work.batch, work.batch, 0, 1), SEED, work.workers)
    loader.order = Order(work.samples, SEED)  # of the first samples alone
    return loader


def _close_project(loader: TrainLoader) -> None:
    loader.close()
    assert isinstance(loader.reader, PictureReader)
    loader.reader.close()


def _delivered_by_project(work: Work, encoded_anew: bool, loader: TrainLoader) -> Delivered:
    """An epoch of the very loader to be timed, and some samples by their ids."""
    counted = delivered(loader, work.dropped)
    ids = np.concatenate([batch.sample_ids.numpy() for batch in loader])  # another epoch: each has its own order
    if len(np.unique(ids)) != len(ids) or len(ids) != work.samples - work.dropped:
        raise ValueError(
            f"{work.manifest}: an epoch of {work.samples} samples gave {len(np.unique(ids))} different ones"
        )
    assert isinstance(loader.reader, PictureReader)
    first = np.arange(min(work.batch, work.samples))
    # A .beton holds JPEGs: what is none in the tars was encoded for it.
    not_jpeg = any(loader.reader.read(sample_id)[:2] != _JPEG for sample_id in first.tolist())
    pictures = loader.reader.batch(first, epoch=0).images
    return counted._replace(by_id=pictures, encoded_anew=encoded_anew or not_jpeg)


def delivered(
    loader: Batches, dropped: int = 0, labels: np.ndarray | None = None, channels_last: bool = True
) -> Delivered:
    """Reads an epoch. labels: int64 (classes,), the data set's label of each that the loader gives; None: the same.

    Errors: ValueError where the pictures are not uint8.
    """
    counts, total, pictures = np.zeros(0, np.int64), 0.0, 0
    for images, batch_labels, *_ in loader:
        own = np.asarray(batch_labels, np.int64).reshape(-1)
        batch = np.bincount(own if labels is None else labels[own])
        size = max(len(batch), len(counts))
        counts = np.pad(counts, (0, size - len(counts))) + np.pad(batch, (0, size - len(batch)))
        total += _mean_level(images) * len(images)
        pictures += len(images)
    shape = tuple(images.shape[1:])
    return Delivered(counts, dropped, total / pictures, shape if channels_last else (*shape[1:], shape[0]))


def _mean_level(images: Tensor) -> float:
    if images.dtype != torch.uint8:
        raise ValueError(f"a loader gave {images.dtype} where uint8 was asked for")
    return images.sum(dtype=torch.int64).item() / images.numel()


def agree(one: Delivered, other: Delivered) -> str | None:
    """Same labels as often, same form, like brightness; where both can be asked by sample id, the same pictures."""
    if one.shape != other.shape:
        return f"pictures of {one.shape} and of {other.shape}"
    if complaint := _labels_agree(one, other):
        return complaint
    if abs(one.mean_level - other.mean_level) > MAX_MEAN_DIFFERENCE:
        return f"mean levels of {one.mean_level:.1f} and {other.mean_level:.1f}"
    if one.by_id is not None and other.by_id is not None:
        difference = (one.by_id.to(torch.int16) - other.by_id.to(torch.int16)).abs().float().mean((1, 2, 3))
        allowed = MAX_PICTURE_DIFFERENCE if one.encoded_anew or other.encoded_anew else 0.0
        if (worst := difference.max().item()) > allowed:
            return f"sample {int(difference.argmax())} differs by {worst:.3g} levels on the mean"
    return None


def _labels_agree(one: Delivered, other: Delivered) -> str | None:
    """What one leaves out may be of any class, but no more than it says."""
    size = max(len(one.label_counts), len(other.label_counts))
    ones, others = (np.pad(d.label_counts, (0, size - len(d.label_counts))) for d in (one, other))
    if ones.sum() + one.dropped != others.sum() + other.dropped:
        return f"{ones.sum()} pictures of an epoch ({one.dropped} left out), and {others.sum()} ({other.dropped})"
    if np.abs(ones - others).sum() > one.dropped + other.dropped:
        label = int(np.abs(ones - others).argmax())
        return f"class {label} comes {ones[label]} times and {others[label]} times"
    return None
