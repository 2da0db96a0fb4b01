"""`evaluate`: one checkpoint's exact accuracy on one split, by protocol, by class, and beside another checkpoint's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.accuracy import Accuracy, Comparison, compare
from pipeline.answers import ROUNDING, Answers
from pipeline.checkpoint import EMA_NAME, WEIGHTS_NAME, recorded_sha256, write_json
from pipeline.data.cache import CacheConfig
from pipeline.data.loader import open_split
from pipeline.evaluator import Evaluator
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.parallel import Ranks, join_ranks, snapshot_environment
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
    """Orders in which the noise protocol is run."""
    shuffle_seed: int = 0
    ema: bool = False
    """Evaluate the averaged weights (optim.ema_decay) instead of the last ones."""
    against: Path | None = None
    """Another run folder or checkpoint: its last weights answer the same pictures, and McNemar's exact test compares
    the two per image."""
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
    """Per image first, then the noise in each order."""
    classes: tuple[ClassCount, ...]
    against: Against | None


def evaluate(config: EvaluateConfig, ranks: Ranks) -> Evaluation:
    """Under torchrun each rank takes its share, and rank 0 writes. Errors: ValueError, OSError naming the mend."""
    checkpoint = open_checkpoint(config.checkpoint)
    other = None if config.against is None else open_checkpoint(config.against)
    if other is not None and (difference := class_difference(other.classes, checkpoint.classes)):
        raise ValueError(
            f"against {config.against}: its classes are not those of {checkpoint.folder}: {difference}; name "
            "a checkpoint that was trained for the same classes"
        )
    device = join_ranks(ranks)
    own = checkpoint.noise if checkpoint.noise.active(training=False) else NoiseConfig()
    noise = replace(own if config.noise.kind == "none" else config.noise, during="eval")
    evaluator = _evaluator(config, checkpoint, noise, config.ema, device)
    other_evaluator = None if other is None else _evaluator(config, other, NoiseConfig(), False, device)
    alone = evaluator.alone(ranks)
    accuracies = [evaluator.count(alone, "per_image")]
    if noise.kind != "none":
        accuracies += [evaluator.with_noise(order, config.shuffle_seed, ranks) for order in config.orders]
    against = None
    if other is not None and other_evaluator is not None:
        answers = other_evaluator.alone(ranks)
        against = Against(other.folder, other_evaluator.count(answers, "per_image"), compare(alone, answers))
    found = Evaluation(accuracies, _by_class(alone, checkpoint.classes), against)
    if ranks.rank == 0:
        write_json(_output(config, checkpoint), _report(config, checkpoint, found))
    return found


def _evaluator(
    config: EvaluateConfig, checkpoint: Checkpoint, noise: NoiseConfig, ema: bool, device: torch.device
) -> Evaluator:
    """A checkpoint on the split, by its own preprocessing. Errors: ValueError where the classes are not its own."""
    data = replace(checkpoint.data, format=config.format, workers=config.workers, cache=config.cache)
    reader = open_split(config.data, data, checkpoint.augment.for_evaluation(), checkpoint.seed)
    require_classes(config.data, reader.classes, checkpoint)
    model = load_model(checkpoint, ema)
    injector = NoiseInjector(model, noise, data.image_size, checkpoint.seed)
    return Evaluator(model.to(device), injector, reader, config.batch, config.workers)


def _by_class(answers: Answers, classes: tuple[str, ...]) -> tuple[ClassCount, ...]:
    right, seen = answers.per_class(len(classes))
    return tuple(map(ClassCount, classes, right.tolist(), seen.tolist()))


def _output(config: EvaluateConfig, checkpoint: Checkpoint) -> Path:
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        return config.output
    run = run_folder(checkpoint)
    name = "per_image" if config.noise.kind == "none" else f"{config.noise.kind}_{config.noise.site_label}"
    return run / f"evaluate_{name}.json"


def _report(config: EvaluateConfig, checkpoint: Checkpoint, found: Evaluation) -> dict[str, Any]:
    against = found.against
    return {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "weights_sha256": recorded_sha256(checkpoint.folder, EMA_NAME if config.ema else WEIGHTS_NAME),
        "config": to_json(config),
        "accuracies": [accuracy.to_json() for accuracy in found.accuracies],
        "near_tie_bound": ROUNDING,
        "classes": to_json(found.classes),
        "against": against
        and {
            "checkpoint": str(against.folder),
            "weights_sha256": recorded_sha256(against.folder, WEIGHTS_NAME),
            "accuracy": against.accuracy.to_json(),
            "comparison": against.comparison.to_json(),
        },
        "environment": snapshot_environment(),
    }
