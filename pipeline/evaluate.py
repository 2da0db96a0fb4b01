"""`evaluate`: one checkpoint's exact accuracy on one split, by protocol, by class, and beside another checkpoint's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.accuracy import Accuracy, Comparison, Order, accuracy_of, compare
from pipeline.answers import ROUNDING, Answers
from pipeline.checkpoint import EMA_NAME, WEIGHTS_NAME, recorded_sha256, write_json
from pipeline.data.cache import CacheConfig
from pipeline.data.class_order import ClassOrder, class_ordered
from pipeline.data.loader import load_manifest, open_split
from pipeline.data.reader import PictureReader
from pipeline.evaluator import Evaluator
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.parallel import Ranks, join_ranks, snapshot_environment
from pipeline.result_file import SAMPLES_KEY, result_file
from pipeline.sections import to_json
from pipeline.trained import Checkpoint, class_difference, load_model, open_checkpoint, require_classes, run_folder


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
    """Orders in which a noise that mixes pictures is run. Another has the same answers in any, and is run once."""
    any_order: bool = False
    """In class order take the data's own order within a class, where that of the file names is not known."""
    shuffle_seed: int = 0
    ema: bool = False
    """Evaluate the averaged weights (optim.ema_decay) instead of the last ones, those of `against` too."""
    against: Path | None = None
    """Another run folder or checkpoint: it answers the same pictures, with its last weights or, by `ema`, its averaged
    ones, and McNemar's exact test compares the two per image."""
    format: Literal["wds", "ffcv"] = "wds"
    batch: int = 250
    workers: int = 2
    output: Path | None = None
    """The JSON file of the result; by default in the run folder, named after step, split, weights, noise, `against`."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """For data in a store, on this machine; the checkpoint's was the training machine's."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}: at least 1")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}: at least 0")
        if self.shuffle_seed < 0:
            raise ValueError(f"shuffle_seed is {self.shuffle_seed}: at least 0")


@dataclass(frozen=True)
class ClassCount:
    """One class of the headline: of `seen` pictures `right` were answered rightly."""

    name: str
    right: int
    seen: int


@dataclass(frozen=True)
class Against:
    """What another checkpoint answers to the same pictures. `comparison.only_other` are its own."""

    folder: Path
    accuracy: Accuracy
    comparison: Comparison


@dataclass(frozen=True)
class Evaluation:
    """What was found of one checkpoint on one split."""

    accuracies: list[Accuracy]
    """Per image first, then the noise: in each order where it mixes pictures, else once, in the manifest's."""
    classes: tuple[ClassCount, ...]
    against: Against | None
    output: Path
    """The JSON file that it is written to."""


def evaluate(config: EvaluateConfig, ranks: Ranks) -> Evaluation:
    """Under torchrun each rank takes its share, and rank 0 writes. Errors: ValueError, OSError naming the mend."""
    checkpoint = open_checkpoint(config.checkpoint)
    other = None if config.against is None else open_checkpoint(config.against)
    if other is not None and (difference := class_difference(checkpoint.classes, other.classes)):
        raise ValueError(
            f"{checkpoint.folder} and --against {config.against} know different classes: {difference}; name a "
            "checkpoint that was trained for the same classes"
        )
    own = checkpoint.noise if checkpoint.noise.active(training=False) else NoiseConfig()
    noise = replace(own if config.noise.kind == "none" else config.noise, during="eval")
    reader = _reader(config, checkpoint)
    by_class = _class_order(config, noise, reader)
    output = run_folder(checkpoint) / _default_name(config, checkpoint, noise, other)
    if ranks.rank == 0:
        output = result_file(config.output, output, reader.samples_sha256)
    device = join_ranks(ranks)
    evaluator = _evaluator(config, checkpoint, reader, noise, device)
    other_evaluator = None
    if other is not None:
        other_evaluator = _evaluator(config, other, _reader(config, other), NoiseConfig(), device)
    alone = evaluator.alone(ranks)
    accuracies = [accuracy_of(alone, "per_image", where=evaluator.name_of)]
    if noise.kind != "none":
        orders: tuple[Order, ...] = config.orders if noise.mixes_samples else ("manifest",)
        ids = None if by_class is None else by_class.ids
        accuracies += [evaluator.with_noise(order, config.shuffle_seed, ranks, ids) for order in orders]
    against = None
    if other is not None and other_evaluator is not None:
        answers = other_evaluator.alone(ranks)
        theirs = accuracy_of(answers, "per_image", where=other_evaluator.name_of)
        against = Against(other.folder, theirs, compare(alone, answers))
    found = Evaluation(accuracies, _by_class(alone, checkpoint.classes), against, output)
    if ranks.rank == 0:
        words = None if by_class is None else by_class.words
        write_json(
            output,
            {SAMPLES_KEY: reader.samples_sha256, "class_order": words} | _report(config, checkpoint, found),
        )
    return found


def _reader(config: EvaluateConfig, checkpoint: Checkpoint) -> PictureReader:
    """The split by a checkpoint's own preprocessing. Errors: ValueError where the classes are not its own."""
    data = replace(checkpoint.data, format=config.format, workers=config.workers, cache=config.cache)
    reader = open_split(config.data, data, checkpoint.augment.for_evaluation(), checkpoint.seed)
    require_classes(config.data, reader.classes, checkpoint)
    return reader


def _class_order(config: EvaluateConfig, noise: NoiseConfig, reader: PictureReader) -> ClassOrder | None:
    """None where no noise is run in class order. Errors: as class_ordered."""
    if not noise.mixes_samples or "class" not in config.orders:
        return None
    return class_ordered(config.data, load_manifest(str(config.data), config.cache), reader, config.any_order)


def _evaluator(
    config: EvaluateConfig, checkpoint: Checkpoint, reader: PictureReader, noise: NoiseConfig, device: torch.device
) -> Evaluator:
    model = load_model(checkpoint, config.ema)
    injector = NoiseInjector(model, noise, checkpoint.data.image_size, checkpoint.seed)
    return Evaluator(model.to(device), injector, reader, config.batch, config.workers)


def _by_class(answers: Answers, classes: tuple[str, ...]) -> tuple[ClassCount, ...]:
    right, seen = answers.per_class(len(classes))
    return tuple(map(ClassCount, classes, right.tolist(), seen.tolist()))


def _default_name(config: EvaluateConfig, checkpoint: Checkpoint, noise: NoiseConfig, other: Checkpoint | None) -> str:
    """Of all that makes it another result, so that none is written over another: `evaluate_step12_val_ema.json`."""
    parts = [f"step{checkpoint.step}", load_manifest(str(config.data), config.cache).split]
    if config.ema:
        parts.append("ema")
    if noise.kind != "none":
        parts += _noise_parts(config, noise)
    if other is not None:
        parts.append(f"against-{run_folder(other).name}-step{other.step}")
    return f"evaluate_{'_'.join(parts)}.json"


def _noise_parts(config: EvaluateConfig, noise: NoiseConfig) -> list[str]:
    parts = [noise.kind, noise.site_label]
    if noise.strength is not None:
        parts.append(f"{noise.strength_at(1):g}")
    if noise.pick == "random_one":
        parts.append("random-one")
    if not noise.spare_prefix_tokens:
        parts.append("all-tokens")
    if noise.mixes_samples:
        parts.append(f"k{noise.group_size or config.batch}")
        if config.shuffle_seed:
            parts.append(f"seed{config.shuffle_seed}")
    return parts


def _report(config: EvaluateConfig, checkpoint: Checkpoint, found: Evaluation) -> dict[str, Any]:
    against, weights = found.against, EMA_NAME if config.ema else WEIGHTS_NAME
    return {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "weights_sha256": recorded_sha256(checkpoint.folder, weights),
        "config": to_json(config),
        "accuracies": [accuracy.to_json() for accuracy in found.accuracies],
        "near_tie_bound": ROUNDING,
        "classes": to_json(found.classes),
        "against": against
        and {
            "checkpoint": str(against.folder),
            "weights_sha256": recorded_sha256(against.folder, weights),
            "accuracy": against.accuracy.to_json(),
            "comparison": against.comparison.to_json(),
        },
        "environment": snapshot_environment(),
    }
