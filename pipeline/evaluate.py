"""Exact top-1 and top-5: every picture once, over any number of ranks.

The headline is per image: no noise, so that a picture's answer does not change with the batch, the order or the other
pictures. What does change with them (a noise that mixes samples) is called transductive and stands with its protocol.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipeline.checkpoint import (
    CONFIG_NAME,
    EMA_NAME,
    LABEL_MAP_NAME,
    WEIGHTS_NAME,
    latest_generation,
    recorded_sha256,
    verify_generation,
    write_json,
)
from pipeline.data.augment import AugmentConfig
from pipeline.data.batch import Batch, Reader
from pipeline.data.cache import CacheConfig
from pipeline.data.loader import DataConfig, EvaluationLoader, open_split
from pipeline.data.order import class_mate_share, class_order, shuffled_order
from pipeline.models import ModelConfig, Preprocess, create_model
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.parallel import Ranks, join_ranks, snapshot_environment
from pipeline.sections import from_json, to_json

Order = Literal["manifest", "class", "shuffled"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluates one checkpoint per image, and by each protocol of `noise` where it has one."""

    checkpoint: Path
    """A run folder (its latest checkpoint) or one checkpoint in it."""
    data: str
    """The manifest of the split to evaluate: a path, or a store's URL."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """Noise at inference, whatever its `during`. Without one, the noise that the checkpoint has during evaluation."""
    orders: tuple[Literal["class", "shuffled"], ...] = ("class", "shuffled")
    """Orders in which the noise protocol is run."""
    shuffle_seed: int = 0
    ema: bool = False
    """Evaluate the averaged weights (optim.ema_decay) instead of the last ones."""
    format: Literal["wds", "ffcv"] = "wds"
    batch: int = 250
    workers: int = 2
    output: Path | None = None
    """Where the JSON result goes; by default into the run folder, named after the noise."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """For data in a store, on this machine; the checkpoint's was the training machine's."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}: at least 1")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}: at least 0")


@dataclass(frozen=True)
class Accuracy:
    """One protocol's counts. `transductive`: another picture in the batch could have changed an answer."""

    protocol: str
    noise: str
    order: Order
    group_size: int
    num_images: int
    correct_top1: int
    correct_top5: int
    class_mate_share: float | None
    transductive: bool

    @property
    def top1(self) -> float:
        return self.correct_top1 / self.num_images

    @property
    def top5(self) -> float:
        return self.correct_top5 / self.num_images

    def to_json(self) -> dict[str, Any]:
        return to_json(self) | {"top1": self.top1, "top5": self.top5}


class Interrupted(Exception):
    """A pass that was given up, by all ranks: its counts mean nothing."""


class Evaluator:
    """A model, its preprocessing and its noise on one split; counts are summed over ranks."""

    def __init__(
        self,
        model: nn.Module,
        injector: NoiseInjector,
        reader: Reader,
        batch: int,
        workers: int,
        half_dtype: torch.dtype | None = None,
    ) -> None:
        """half_dtype: of autocast, as in training; None computes in the weights' own format."""
        self.model = model
        self.injector = injector
        self.reader = reader
        self.batch = batch
        self.workers = workers
        self.half_dtype = half_dtype
        self.device = next(model.parameters()).device
        self.preprocess = Preprocess(model, self.device, injector)

    def per_image(self, ranks: Ranks, still_wanted: Callable[[], bool] = lambda: True) -> Accuracy:
        """Noise off, whatever was trained with it.

        still_wanted: asked before each batch, by all ranks equally often, so it may be a collective that gives the same
        answer everywhere. Errors: Interrupted where it is not.
        """
        with self.injector.off():
            return self._run("per_image", "manifest", np.arange(len(self.reader)), 1, ranks, still_wanted)

    def with_noise(self, order: Order, seed: int, ranks: Ranks) -> Accuracy:
        """The injector's noise, in class order or shuffled."""
        labels = self.reader.labels_of(np.arange(len(self.reader)))
        ids = class_order(labels) if order == "class" else shuffled_order(len(labels), seed)
        config = self.injector.config
        group = (config.group_size or self.batch) if config.mixes_samples else 1
        name = f"{config.kind}_{config.site_label}_{order}_k{group}"
        return self._run(name, order, ids, group, ranks)

    @torch.no_grad()
    def _run(
        self,
        protocol: str,
        order: Order,
        ids: np.ndarray,
        group: int,
        ranks: Ranks,
        still_wanted: Callable[[], bool] = lambda: True,
    ) -> Accuracy:
        was_training = self.model.training
        self.model.eval()
        loader = EvaluationLoader(self.reader, ids, self.batch, group, ranks.rank, ranks.world_size, self.workers)
        counts = torch.zeros(4, dtype=torch.int64)  # seen, sum of ids, top-1, top-5
        for batch in _in_rounds(loader, loader.most_batches):
            if not still_wanted():
                self.model.train(was_training)
                raise Interrupted
            if batch is None:
                continue
            images, labels, sample_ids, _ = batch
            self.injector.set_batch(sample_ids.to(self.device), epoch=0)
            with torch.autocast(self.device.type, self.half_dtype, enabled=self.half_dtype is not None):
                logits = self.model(self.preprocess(images)).float().cpu()
            if not torch.isfinite(logits).all():
                raise ValueError(
                    f"the model's output is not finite near sample {int(sample_ids[0])}: it cannot be ranked"
                )
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            counts += torch.stack((torch.tensor(len(labels)), sample_ids.sum(), best[:, 0].sum(), best.any(1).sum()))
        self.model.train(was_training)
        seen, id_sum, top1, top5 = _summed(counts, self.device, ranks)
        n = len(ids)
        assert (seen, id_sum) == (n, n * (n - 1) // 2), f"{seen} of {n} pictures were evaluated exactly once"
        noise = self.injector.config if self.injector.enabled else NoiseConfig()
        share = class_mate_share(self.reader.labels_of(ids), group) if group > 1 else None
        return Accuracy(protocol, noise.describe(), order, group, n, top1, top5, share, noise.mixes_samples)


def _in_rounds(batches: Iterable[Batch], rounds: int) -> Iterator[Batch | None]:
    """None where a rank has no more, but another has."""
    iterator = iter(batches)
    for _ in range(rounds):
        yield next(iterator, None)


def _summed(counts: torch.Tensor, device: torch.device, ranks: Ranks) -> list[int]:
    if ranks.world_size > 1:
        counts = counts.to(device)
        dist.all_reduce(counts)
    return counts.tolist()


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself, enough to build its model again."""

    folder: Path
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig
    noise: NoiseConfig
    classes: tuple[str, ...]
    seed: int
    step: int


def open_checkpoint(source: Path) -> Checkpoint:
    """A run folder's latest checkpoint, or the checkpoint itself. Errors name the folder and the mend."""
    if not source.is_dir():
        raise FileNotFoundError(f"no checkpoint at {source}: name a run folder, or a checkpoint in it")
    folder = latest_generation(source) if (source / "checkpoints").is_dir() else source
    if folder is None:
        raise FileNotFoundError(f"{source} holds no finished checkpoint: train there first, or name another")
    verify_generation(folder, lambda name: name == CONFIG_NAME)  # a run folder has a config.json too, but no sums
    path = folder / CONFIG_NAME
    body = json.loads(path.read_text())
    # The checkpoint's own copy: the file that training read may be gone, or changed.
    own_map = folder / LABEL_MAP_NAME if (folder / LABEL_MAP_NAME).is_file() else None
    return Checkpoint(
        folder,
        model=from_json(ModelConfig, body["model"], f"{path}: model"),
        data=replace(from_json(DataConfig, body["data"], f"{path}: data"), label_map=own_map),
        augment=from_json(AugmentConfig, body["augment"], f"{path}: augment"),
        noise=from_json(NoiseConfig, body["noise"], f"{path}: noise"),
        classes=tuple(body["classes"]),
        seed=body["seed"],
        step=body["step"],
    )


def run_folder(checkpoint: Checkpoint) -> Path:
    """The folder of the run that it is of; its own where it stands alone."""
    return next((p.parent for p in checkpoint.folder.parents if p.name == "checkpoints"), checkpoint.folder)


def load_model(checkpoint: Checkpoint, ema: bool = False) -> nn.Module:
    """The checkpoint's timm model with its weights or their average, on the CPU, its sums checked."""
    config = replace(checkpoint.model.without_start(), init_from=checkpoint.folder, init_ema=ema)
    return create_model(config, len(checkpoint.classes), checkpoint.data.image_size)


def evaluate(config: EvaluateConfig, ranks: Ranks) -> list[Accuracy]:
    """Per image first, then the noise in each order. Under torchrun each rank takes its share, and rank 0 writes."""
    checkpoint = open_checkpoint(config.checkpoint)
    data = replace(checkpoint.data, format=config.format, workers=config.workers, cache=config.cache)
    augment = checkpoint.augment.for_evaluation()
    reader = open_split(config.data, data, augment, checkpoint.seed)
    if reader.classes != checkpoint.classes:
        raise ValueError(
            f"{config.data} has {len(reader.classes)} classes {reader.classes[:3]}..., the checkpoint was trained on "
            f"{len(checkpoint.classes)} {checkpoint.classes[:3]}...: evaluate the data it was trained for"
        )
    model = load_model(checkpoint, config.ema)
    own = checkpoint.noise if checkpoint.noise.active(training=False) else NoiseConfig()
    noise = replace(own if config.noise.kind == "none" else config.noise, during="eval")
    injector = NoiseInjector(model, noise, data.image_size, checkpoint.seed)
    model.to(join_ranks(ranks))
    evaluator = Evaluator(model, injector, reader, config.batch, config.workers)
    results = [evaluator.per_image(ranks)]
    if noise.kind != "none":
        results += [evaluator.with_noise(order, config.shuffle_seed, ranks) for order in config.orders]
    if ranks.rank == 0:
        write_json(_output(config, checkpoint), _report(config, checkpoint, results))
    return results


def _output(config: EvaluateConfig, checkpoint: Checkpoint) -> Path:
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        return config.output
    run = run_folder(checkpoint)
    name = "per_image" if config.noise.kind == "none" else f"{config.noise.kind}_{config.noise.site_label}"
    return run / f"evaluate_{name}.json"


def _report(config: EvaluateConfig, checkpoint: Checkpoint, results: list[Accuracy]) -> dict[str, Any]:
    return {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "weights_sha256": recorded_sha256(checkpoint.folder, EMA_NAME if config.ema else WEIGHTS_NAME),
        "config": to_json(config),
        "accuracies": [result.to_json() for result in results],
        "environment": snapshot_environment(),
    }
