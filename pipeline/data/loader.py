"""Opens a split, and hands out its batches in the exact order, for training and for evaluation."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.manifest import Manifest, parse_manifest, read_manifest
from pipeline.data.augment import AugmentConfig
from pipeline.data.batch import Batch, Reader, Replaced
from pipeline.data.beton import BetonSource
from pipeline.data.cache import CacheConfig, ShardCache
from pipeline.data.order import Layout, Order, evaluation_batches, steps_per_epoch, training_micro_batches
from pipeline.data.reader import Labels, PictureReader, Reading
from pipeline.data.remote import checked_url, fetch_bytes, is_url
from pipeline.data.shards import TarSource
from pipeline.data.source import Source, allow_open_files
from pipeline.data.stream import IN_FLIGHT, Item, Stream

_MANIFEST_BYTES = 1 << 30  # a note for each of a million pictures is 200 MB


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and how they are read."""

    train: str = "shards/train.manifest.json"
    """A path, or the URL of an object store that fsspec reads, such as s3://bucket/train.manifest.json."""
    val: str = "shards/val.manifest.json"
    format: Literal["wds", "ffcv"] = "wds"
    """`wds` reads the WebDataset tars, `ffcv` the .beton of the same manifest."""
    image_size: int = 224
    """Side of the pictures that the model gets, in pixels."""
    workers: int = 4
    """Decoding threads of each rank; processes where RandAugment, 3-Augment or colour jitter is on, or the native
    library is not built."""
    window: int = 0
    """Shuffle within so many shards at a time, which bounds what a cache must hold; 0 shuffles all samples."""
    on_bad_sample: Literal["stop", "replace"] = "stop"
    """In training, a sample that cannot be read ends the run, or the next that can stands in for it and is counted."""
    check_crc: bool = True
    """Compare each picture's bytes with the checksum of its index. Without it a damaged one may pass as another."""
    label_map: Path | None = None
    """JSON object: each class of the manifest -> its new class, such as {"3": "odd", "4": "even"}."""
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"data.image_size is {self.image_size}: at least 1 pixel")
        for name in ("workers", "window"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} is {getattr(self, name)}: at least 0")


def open_split(where: str, config: DataConfig, augment: AugmentConfig, seed: int) -> PictureReader:
    """Opens and checks a split; `where` is its manifest's path or URL.

    Errors: ValueError, FileNotFoundError naming the file and the mend.
    """
    where = str(where)
    manifest = load_manifest(where, config.cache)
    if manifest.num_samples == 0:
        raise ValueError(f"{where} has no samples: shard a folder with pictures")
    source = _open_source(where, manifest, config)
    in_shards = source.index.labels()
    counts = np.bincount(in_shards.clip(-1) + 1, minlength=len(manifest.classes) + 1)[1:]
    if tuple(counts.tolist()) != manifest.class_counts:
        raise ValueError(f"the labels in the indexes beside {where} are not those it counts: {source.mend(0)}")
    labels = Labels(manifest.classes, np.arange(len(manifest.classes)))
    if config.label_map is not None:
        labels = mapped_labels(manifest, config.label_map)
    threads = max(1, config.workers)
    sizes = tuple(shard.samples for shard in manifest.shards)
    samples = hashlib.sha256(manifest.samples_sha256().encode() + labels.table[in_shards].tobytes()).hexdigest()
    reading = Reading(config.image_size, augment, seed, threads, config.on_bad_sample, config.check_crc)
    allow_open_files()
    return PictureReader(source, labels, sizes, samples, reading)


def load_manifest(where: str, cache: CacheConfig) -> Manifest:
    """The manifest at a path or URL. Errors: ValueError, OSError naming it and the mend."""
    if not is_url(where):
        return read_manifest(Path(where))
    data = fetch_bytes(checked_url(where), cache.retry, _MANIFEST_BYTES)
    return parse_manifest(data, where, cache.folder)


def _open_source(where: str, manifest: Manifest, config: DataConfig) -> Source:
    if config.format == "ffcv":
        if is_url(where):
            raise ValueError(f"data.format ffcv reads local files, not {where}: copy the .beton here, or use wds")
        return BetonSource(manifest)
    if not manifest.shards:
        raise ValueError(f"{where} has a .beton alone: use data.format ffcv")
    head, slash, _ = where.rpartition("/")
    folder = head or slash or "."
    if not is_url(where):
        return TarSource(manifest, folder, None)
    _check_limit(manifest, config)
    return TarSource(manifest, folder, ShardCache(folder, manifest.shards, config.cache))


def _check_limit(manifest: Manifest, config: DataConfig) -> None:
    """Errors: ValueError where the cache cannot hold what must be there at once."""
    sizes = sorted((shard.bytes for shard in manifest.shards), reverse=True)
    # The window that is read, and the next: ranks are not all at the same step.
    needed = sum(sizes[: 2 * config.window] if config.window else sizes) / 1e9
    if needed > config.cache.gigabytes:
        lower = f"lower data.window {config.window}" if config.window else "set data.window"
        raise ValueError(
            f"data.cache.gigabytes is {config.cache.gigabytes:g}, but {needed:.3g} GB of {manifest.split}'s shards are "
            "needed at once: "
            f"raise it, or {lower}"
        )


def mapped_labels(manifest: Manifest, path: Path) -> Labels:
    """The manifest's labels after a map; new classes are sorted by name, as ImageFolder does.

    Errors: ValueError where the map leaves a class out or names one that does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.label_map {path} does not exist: give a JSON object of class -> new class")
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"data.label_map {path} is not JSON: {error}") from error
    if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
        raise ValueError(f'data.label_map {path}: give a JSON object of names, such as {{"cat": "animal"}}')
    missing, unknown = set(manifest.classes) - mapping.keys(), mapping.keys() - set(manifest.classes)
    if missing or unknown:
        faults = [f"it leaves out {sorted(missing)[:5]}"] if missing else []
        faults += [f"it names {sorted(unknown)[:5]}, which {manifest.path} has not"] if unknown else []
        raise ValueError(f"data.label_map {path}: {'; '.join(faults)}")
    classes = tuple(sorted(set(mapping.values())))
    table = np.array([classes.index(mapping[name]) for name in manifest.classes], np.int64)
    return Labels(classes, table)


class TrainLoader:
    """Iterating gives the rest of the running epoch's micro-batches for this rank; then the next epoch begins.

    The state is (epoch, position in samples), counted at the step whose last micro-batch was handed out. It holds no
    rank and no worker count: another layout with the same global batch goes on exactly.
    """

    def __init__(self, reader: Reader, layout: Layout, seed: int, workers: int, window: int = 0) -> None:
        """workers, window: as in DataConfig."""
        self.reader = reader
        self.layout = layout
        self.order = Order(len(reader), seed, reader.shard_sizes, window)
        if window and reader.fetches:
            self._check_window(window)
        self.epoch = 0
        self.step = 0  # within the epoch
        self.steps_per_epoch = steps_per_epoch(len(reader), layout.global_batch)
        self.replaced: list[Replaced] = []  # by this rank, since it was asked for
        self._stream = Stream(reader, self._plan, worker_processes(reader, workers), persistent=True)

    def __iter__(self) -> Iterator[Batch]:
        for i, batch in enumerate(self._stream, start=1):
            if i % self.layout.accumulation == 0:
                self.step += 1
            self.replaced += batch.replaced
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def _check_window(self, window: int) -> None:
        """Errors: ValueError where the steps under way could lie in more windows than a cache has room for."""
        under_way = IN_FLIGHT * self.layout.global_batch
        per_shard = len(self.reader) / len(self.reader.shard_sizes)
        if window * per_shard < under_way:
            raise ValueError(
                f"data.window {window} holds some {window * per_shard:.0f} samples, fewer than the {under_way} of "
                f"{IN_FLIGHT} steps, which are read at once: raise it to {math.ceil(under_way / per_shard)}, or to 0"
            )

    def take_replaced(self) -> list[Replaced]:
        """What was replaced since the last call."""
        taken, self.replaced = self.replaced, []
        return taken

    def close(self) -> None:
        """Ends the worker processes."""
        self._stream.close()

    def state_dict(self) -> dict[str, Any]:
        epochs, step = divmod(self.step, self.steps_per_epoch)  # the end of an epoch is the start of the next
        return {
            "epoch": self.epoch + epochs,
            "position": step * self.layout.global_batch,
            "seed": self.order.seed,
            "num_samples": self.order.num_samples,
            "window": self.order.window,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Errors: ValueError where the state is of other data, another seed, window or global batch."""
        here = self.state_dict()
        for name in ("seed", "num_samples", "window"):
            if state.get(name) != here[name]:
                raise ValueError(
                    f"cannot resume: {name} was {state.get(name)}, is {here[name]}; the order would be another"
                )
        end = self.steps_per_epoch * self.layout.global_batch
        if not 0 <= state["position"] < end or state["epoch"] < 0:
            raise ValueError(f"cannot resume at position {state['position']} of epoch {state['epoch']}: it is damaged")
        if state["position"] % self.layout.global_batch:
            raise ValueError(
                f"cannot resume at position {state['position']} with global_batch {self.layout.global_batch}: keep it"
            )
        self.epoch, self.step = state["epoch"], state["position"] // self.layout.global_batch

    def _plan(self) -> Iterator[Item]:
        epoch, first = self.epoch, self.step
        batches = training_micro_batches(self.order, epoch, self.layout, first)
        for i, sample_ids in enumerate(batches):
            step = first + i // self.layout.accumulation
            yield Item(sample_ids, epoch, self.order.shards(epoch, step * self.layout.global_batch))


class EvaluationLoader:
    """This rank's share of one pass over `order`, each sample once over all ranks, groups never split."""

    def __init__(
        self, reader: Reader, order: np.ndarray, batch: int, group: int, rank: int, world_size: int, workers: int
    ) -> None:
        self._reader = reader
        self._batches = list(evaluation_batches(order, batch, group, rank, world_size))
        counts = [sum(1 for _ in evaluation_batches(order, batch, group, r, world_size)) for r in range(world_size)]
        self.most_batches = max(counts)  # of any rank
        self._stream = Stream(reader, self._plan, worker_processes(reader, workers), persistent=False)

    def __iter__(self) -> Iterator[Batch]:
        yield from self._stream

    def _plan(self) -> Iterator[Item]:
        """With each batch the shards that this rank still needs: those that it has done with may leave a cache."""
        ends = np.cumsum(self._reader.shard_sizes)
        used = [np.searchsorted(ends, ids, side="right") for ids in self._batches]
        last_use = {shard: i for i, shards in enumerate(used) for shard in shards.tolist()}
        in_order = list(dict.fromkeys(shard for shards in used for shard in shards.tolist()))
        for i, sample_ids in enumerate(self._batches):
            in_order = [shard for shard in in_order if last_use[shard] >= i]
            yield Item(sample_ids, None, np.array(in_order, np.int64))


def worker_processes(reader: Reader, workers: int) -> int:
    """How many processes read, where threads of this one would wait for Python; else 0."""
    return 0 if reader.threaded else workers
