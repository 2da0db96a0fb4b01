"""Opens a split, and hands out its batches in the exact order, for training and for evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_prep.manifest import Manifest, read_manifest
from pipeline.data.augment import AugmentConfig
from pipeline.data.batch import Batch, Reader
from pipeline.data.beton import BetonReader
from pipeline.data.order import Layout, evaluation_batches, steps_per_epoch, training_micro_batches
from pipeline.data.shards import ShardReader


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and how they are read."""

    train: Path = Path("shards/train.manifest.json")
    val: Path = Path("shards/val.manifest.json")
    format: Literal["wds", "ffcv"] = "wds"
    """`wds` reads the WebDataset tars, `ffcv` the .beton of the same manifest."""
    image_size: int = 224
    """Side of the pictures that the model gets, in pixels."""
    workers: int = 4
    """Decoding processes (wds) or threads (ffcv) of each rank; 0 decodes in the rank itself."""
    label_map: Path | None = None
    """JSON object: each class of the manifest -> its new class, such as {"3": "odd", "4": "even"}."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"data.image_size is {self.image_size}: at least 1 pixel")
        if self.workers < 0:
            raise ValueError(f"data.workers is {self.workers}: at least 0")


def open_split(manifest_path: Path, config: DataConfig, augment: AugmentConfig, seed: int) -> Reader:
    """Opens and checks a split. Errors: ValueError, FileNotFoundError naming the file and the mend."""
    manifest = read_manifest(manifest_path)
    if manifest.num_samples == 0:
        raise ValueError(f"{manifest_path} has no samples: shard a folder with pictures")
    if config.format == "ffcv" and augment.randaugment:
        raise ValueError("augment.randaugment needs data.format wds: the .beton path only crops and flips")
    reader: Reader
    if config.format == "ffcv":
        reader = BetonReader(manifest, config.image_size, augment, seed, config.workers)
    else:
        reader = ShardReader(manifest, config.image_size, augment, seed)
    if config.label_map is not None:
        reader.labels, reader.classes = mapped_labels(reader.labels, manifest, config.label_map)
    return reader


def mapped_labels(labels: np.ndarray, manifest: Manifest, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 (n,) and class names after the map; new classes are sorted by name, as ImageFolder does.

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
    return table[labels], classes


class TrainLoader:
    """Iterating gives the rest of the running epoch's micro-batches for this rank; then the next epoch begins.

    The state is (epoch, position in samples), counted at the step whose last micro-batch was handed out. It holds no
    rank and no worker count: another layout with the same global batch goes on exactly.
    """

    def __init__(self, reader: Reader, layout: Layout, seed: int, workers: int) -> None:
        self.reader = reader
        self.layout = layout
        self.seed = seed
        self.epoch = 0
        self.step = 0  # within the epoch
        self.steps_per_epoch = steps_per_epoch(len(reader.labels), layout.global_batch)
        self._plan: list[tuple[np.ndarray, int]] = []
        # The .beton's threads live in its reader; forking after they have started would copy none of them.
        processes = 0 if isinstance(reader, BetonReader) else workers
        self._batches = _Batches(reader, self._plan, processes, persistent=True)

    def __iter__(self) -> Iterator[Batch]:
        n = len(self.reader.labels)
        ids = training_micro_batches(n, self.seed, self.epoch, self.layout, self.step)
        self._plan[:] = [(micro, self.epoch) for micro in ids]
        for i, batch in enumerate(self._batches, start=1):
            if i % self.layout.accumulation == 0:
                self.step += 1
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def close(self) -> None:
        """Ends the worker processes."""
        self._batches.processes = None

    def state_dict(self) -> dict[str, Any]:
        epochs, step = divmod(self.step, self.steps_per_epoch)  # the end of an epoch is the start of the next
        return {
            "epoch": self.epoch + epochs,
            "position": step * self.layout.global_batch,
            "seed": self.seed,
            "num_samples": len(self.reader.labels),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Errors: ValueError where the state is of other data, another seed or another global batch."""
        here = self.state_dict()
        for name in ("seed", "num_samples"):
            if state[name] != here[name]:
                raise ValueError(
                    f"cannot resume: {name} was {state[name]}, is {here[name]}; the order would be another"
                )
        if state["position"] % self.layout.global_batch:
            raise ValueError(
                f"cannot resume at position {state['position']} with global_batch {self.layout.global_batch}: keep it"
            )
        self.epoch, self.step = state["epoch"], state["position"] // self.layout.global_batch


class EvaluationLoader:
    """This rank's share of one pass over `order`, each sample once over all ranks, groups never split."""

    def __init__(
        self, reader: Reader, order: np.ndarray, batch: int, group: int, rank: int, world_size: int, workers: int
    ) -> None:
        plan: list[tuple[np.ndarray, int | None]] = [
            (ids, None) for ids in evaluation_batches(order, batch, group, rank, world_size)
        ]
        self._batches = _Batches(reader, plan, 0 if isinstance(reader, BetonReader) else workers, persistent=False)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


class _Items(Dataset):
    """What worker processes run: an item of the plan -> its batch, or the error that it met."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, item: tuple[np.ndarray, int | None]) -> Batch | Exception:
        try:
            return self.reader.batch(*item)
        except (ValueError, OSError) as error:
            return error  # raised in a worker, torch would put that process's traceback into the message


class _Batches:
    """Runs a plan of (sample ids, epoch), by worker processes or one batch ahead on a thread.

    The plan is read anew at each iteration, so that `persistent` workers serve every epoch.
    """

    def __init__(self, reader: Reader, plan: list, workers: int, persistent: bool) -> None:
        self.items = _Items(reader)
        self.plan = plan
        self.processes = None
        if workers:
            self.processes = DataLoader(
                self.items,
                batch_size=None,
                sampler=_Live(plan),
                num_workers=workers,
                persistent_workers=persistent,
                pin_memory=torch.cuda.is_available(),
            )

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.processes if self.processes is not None else self._ahead():
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def _ahead(self) -> Iterator[Batch | Exception]:
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            coming = None
            for item in list(self.plan):
                following = pool.submit(self.items.__getitem__, item)
                if coming is not None:
                    yield coming.result()
                coming = following
            if coming is not None:
                yield coming.result()


class _Live:
    """A sampler over a list that changes from epoch to epoch."""

    def __init__(self, plan: list) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[tuple[np.ndarray, int | None]]:
        return iter(list(self.plan))

    def __len__(self) -> int:
        return len(self.plan)
