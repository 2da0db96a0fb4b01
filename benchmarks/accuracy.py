"""The paper's tables as a grid, on small pictures: what each noise gives a picture on its own, and what its mates add.

Every training is a cell: (model, noise in training or none, seed). A clean one is then asked with every noise of the
grid at inference (`eval`); a noisy one with the noise off (`train`) and with its own noise on (`both`). Each cell is
kept when it is done; the same command goes on, and tasks of a Slurm array share the cells, and may share the file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from benchmarks.accuracy_grid import Model, NoiseName, Point, noise_of, points
from benchmarks.accuracy_summary import print_summary
from benchmarks.cells import Cell, check_minutes, run_cells
from benchmarks.cifar_audit import InMemory
from benchmarks.cifar_data import Pictures, read_pictures
from benchmarks.cifar_training import OnDevice, Training, conditions_of, moved, train
from benchmarks.harness import OnTurn, check_output, circumstances_of, status_line
from benchmarks.training_step import chosen_device
from data_prep.tasks import task_from
from pipeline.answers import Answers, answers_of
from pipeline.audit.protocols import averaged
from pipeline.data.order import class_mate_share, class_order, shuffled_order
from pipeline.models import create_model
from pipeline.noise.config import LINEAR_KINDS, NoiseConfig
from pipeline.optim import OptimConfig
from pipeline.sections import to_json

_SMALL_VIT = "vit_tiny_patch16_224:patch_size=8,embed_dim=128,depth=4,num_heads=4"
_SMALL_RESNET = "resnet10t:stem_width=16"
WARMUP_SHARE = 0.1  # of the training
_LISTS = ("models", "noises", "gaussian", "salt_and_pepper", "circular_shift", "train_sites", "eval_sites")


@dataclass(frozen=True)
class AccuracyOptions:
    """The grid of the paper's tables on pictures that fit the device's memory, several seeds, cell by cell.

    The defaults are a reduced grid of 30 cells. On CIFAR-10 the ten of a seed train for some 35 minutes on one CPU core
    that does nothing else; two tasks on a core each halve that.
    """

    data: Path | None = None
    """A folder or an archive with train/<class>/*.jpg and test/<class>/*.jpg. None: cifar10-jpeg.tar.xz of the folder
    that NOISYNN_SAMPLES names."""
    models: tuple[str, ...] = (_SMALL_VIT, _SMALL_RESNET)
    """timm's names of ViTs and ResNets, each with options after a colon."""
    noises: tuple[NoiseName, ...] = ("gaussian", "salt_and_pepper", "circular_shift", "optimal_q")
    """Kinds; `none` is always run."""
    gaussian: tuple[float, ...] = (0.2,)
    """Standard deviations."""
    salt_and_pepper: tuple[float, ...] = (0.05,)
    """Probabilities."""
    circular_shift: tuple[float, ...] = (0.3,)
    """Alphas, below 0.5."""
    train_sites: tuple[str, ...] = ("last",)
    """Where noise acts in trainings: image, embedding, last (the official place), random, residual, or blockI. Each
    noise and site is a training of its own for each seed."""
    eval_sites: tuple[str, ...] = ("image", "embedding", "last", "random", "residual")
    """Where noise acts at inference on the cleanly trained model."""
    group_train: int = 8
    """Pictures that a linear noise mixes in training."""
    group_eval: int = 10
    """Likewise at inference; the published protocol has 10."""
    seeds: int = 3
    """Seeds 0, 1, ..., each of every training."""
    epochs: int = 6
    """Of each training."""
    batch: int = 256
    """A multiple of group_train."""
    lr: float = 1e-3
    """Peak of AdamW's rate, after a warm-up over a tenth of the training."""
    weight_decay: float = 0.05
    train_images: int | None = 20_000
    """So many, the first of each class; None: all."""
    test_images: int | None = 5_000
    """So many, the first of each class; None: all."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of autocast in training; answers are always float32's."""
    compile: bool = False
    """By torch.compile: worth its start on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    minutes: float = 90
    """No further cell is begun that should not end by then."""
    task: int | None = None
    """Which of --num-tasks this is, from 0; a Slurm array says it itself."""
    num_tasks: int | None = None
    """Tasks that share the cells."""
    note: str = ""
    """Kept in each row, such as `no other load`."""
    output: Path | None = None
    """JSON lines to add to; benchmarks/results/accuracy.jsonl if None."""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("epochs", 1), ("group_train", 1), ("group_eval", 2)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least {least}")
        for name in _LISTS:
            values = getattr(self, name)
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"--{name.replace('_', '-')} names {twice[0]} twice: once will do")
        if self.batch < 1 or self.batch % self.group_train:
            raise ValueError(f"--batch {self.batch}: a multiple of --group-train {self.group_train}")
        self.optim  # noqa: B018  (refuses a wrong rate or decay)
        check_minutes(self.minutes)

    @property
    def optim(self) -> OptimConfig:
        return OptimConfig(lr=self.lr, weight_decay=self.weight_decay, warmup_epochs=WARMUP_SHARE * self.epochs)

    def points(self, sites: Sequence[str]) -> list[Point]:
        strengths: dict[NoiseName, tuple[float, ...]] = {
            "gaussian": self.gaussian,
            "salt_and_pepper": self.salt_and_pepper,
            "circular_shift": self.circular_shift,
        }
        return list(points(self.noises, strengths, sites))


class GridTraining(NamedTuple):
    """A training of the grid."""

    model: Model
    point: Point | None
    """None: clean."""
    noise: NoiseConfig
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model.text}, {self.noise.describe()}, seed {self.seed}"


def measure_accuracy(options: AccuracyOptions, command: Sequence[str]) -> list[dict[str, Any]]:
    """Trains, evaluates, writes and prints. Errors: ValueError, OSError naming the option or file and the mend."""
    start = time.monotonic()
    path = check_output(options.output, "accuracy")
    task = task_from(options.task, options.num_tasks)
    circumstances = circumstances_of(command, options.note)
    device = chosen_device(options.device)
    with status_line() as on_turn:
        on_turn("decoding the pictures")
        pictures = read_pictures(options.data, options.train_images, options.test_images)
        data = moved(pictures, device)
        trainings = list(_trainings(options, data))
        _check(options, data)
        shared = _conditions(options, pictures, device)
        cells = [
            Cell(
                training.name,
                shared | _own_conditions(options, training),
                weight=1,
                measure=partial(_measure_cell, options, data, training, on_turn),
            )
            for training in trainings
        ]
        rows = run_cells(
            "accuracy", cells[task.index :: task.count], path, circumstances, options.minutes, on_turn, start
        )
    measured = [row for of_cell in rows.values() for row in of_cell]
    if measured:
        print_summary(measured)
        print(f"rows with versions, commit and command in {path}")
    return measured


def _trainings(options: AccuracyOptions, data: OnDevice) -> Iterator[GridTraining]:
    """Seed by seed, so that a run that is cut has whole seeds. Errors: ValueError for a model or site that is none."""
    probes = {text: create_model(Model(text).config, data.classes, data.side) for text in options.models}
    for seed in range(options.seeds):
        for text, probe in probes.items():
            yield GridTraining(Model(text), None, NoiseConfig(), seed)
            for point in options.points(options.train_sites):
                if noise := noise_of(point, probe, "both", options.group_train):
                    yield GridTraining(Model(text), point, noise, seed)
    for probe in probes.values():
        for point in options.points(options.eval_sites):
            noise_of(point, probe, "eval", options.group_eval)


def _conditions(options: AccuracyOptions, pictures: Pictures, device: torch.device) -> dict[str, Any]:
    names = ("epochs", "batch", "lr", "weight_decay", "dtype", "compile", "group_train", "group_eval")
    return {name: getattr(options, name) for name in names} | conditions_of(pictures, device)


def _own_conditions(options: AccuracyOptions, training: GridTraining) -> dict[str, Any]:
    """A clean cell is asked with the whole grid, so it depends on the grid."""
    asked = [to_json(point) for point in options.points(options.eval_sites)] if training.point is None else []
    return {
        "model": training.model.text,
        "noise": training.noise.describe(),
        "seed": training.seed,
        "asked_with": asked,
    }


def _check(options: AccuracyOptions, data: OnDevice) -> None:
    """Errors: ValueError for what does not fit the pictures, before anything is trained."""
    if options.batch > len(data.labels):
        raise ValueError(f"--batch {options.batch} is more than the {len(data.labels)} pictures: lower it")
    if options.group_eval > len(data.tested.labels):
        raise ValueError(f"--group-eval {options.group_eval} is more than the {len(data.tested.labels)} test pictures")


def _measure_cell(
    options: AccuracyOptions, data: OnDevice, cell: GridTraining, on_turn: OnTurn, kept: dict[str, Any]
) -> list[str]:
    if options.compile:
        torch.compiler.reset()  # the graph of the cell before
    training = Training(
        model=cell.model.config,
        noise=cell.noise,
        seed=cell.seed,
        epochs=options.epochs,
        batch=options.batch,
        optim=options.optim,
        dtype=options.dtype,
        compile=options.compile,
    )
    trained = train(training, data, lambda epoch: on_turn(f"{cell.name}: epoch {epoch + 1} of {options.epochs}"))
    on_turn(f"{cell.name}: evaluating")
    respondent = InMemory(trained.model, data.tested, cell.seed)
    row = {
        "question": "accuracy",
        "part": cell.model.text,
        "contestant": cell.noise.describe(),
        "seed": cell.seed,
        "trained_with": None if cell.point is None else to_json(cell.point),
        "found": [to_json(found) for found in _found(options, cell, respondent)],
        "last_epoch_loss": trained.last_loss,
        "training_seconds": sum(trained.epoch_seconds),
        "parameters": sum(p.numel() for p in trained.model.parameters()),
    }
    return [json.dumps(row | kept, ensure_ascii=False)]


@dataclass(frozen=True)
class Found:
    """One figure of a cell."""

    during: Literal["off", "eval", "both", "vote"]
    """`off`: no noise at inference. `vote`: none either, but logits averaged over the group."""
    point: Point | None
    """The noise at inference."""
    order: Literal["any", "class", "shuffled"]
    k: int
    correct_top1: int
    num_images: int
    transductive: bool
    class_mates: float | None
    """Share of a picture's group mates that are of its class."""


def _found(options: AccuracyOptions, cell: GridTraining, respondent: InMemory) -> Iterator[Found]:
    labels, k = respondent.labels, options.group_eval
    everything = np.arange(len(labels))
    plain = answers_of(respondent.plain_logits, torch.from_numpy(labels), torch.from_numpy(everything))
    yield Found("off", None, "any", 1, plain.top1, len(labels), False, None)
    by_class = class_order(labels)
    votes = averaged(respondent.plain_logits[by_class], k)
    voted = answers_of(votes, torch.from_numpy(labels[by_class]), torch.from_numpy(by_class))
    yield Found("vote", None, "class", k, voted.top1, len(labels), True, class_mate_share(labels[by_class], k))
    asked = options.points(options.eval_sites) if cell.point is None else [cell.point]
    for point in asked:
        noise = noise_of(point, respondent.model, "eval", k)
        if noise is not None:
            during: Literal["eval", "both"] = "eval" if cell.point is None else "both"
            yield from _with_noise(during, point, noise, respondent, plain, cell.seed)


def _with_noise(
    during: Literal["eval", "both"],
    point: Point,
    noise: NoiseConfig,
    respondent: InMemory,
    plain: Answers,
    seed: int,
) -> Iterator[Found]:
    labels, k = respondent.labels, noise.group_size or 1
    if not noise.mixes_samples:
        answers = respondent.answers(noise, np.arange(len(labels)))
        yield Found(during, point, "any", 1, answers.top1, len(labels), False, None)
        return
    orders: dict[Literal["class", "shuffled"], np.ndarray] = {
        "class": class_order(labels),
        "shuffled": shuffled_order(len(labels), seed),
    }
    for order, ids in orders.items():
        answers = respondent.answers(noise, ids)
        share = class_mate_share(labels[ids], k)
        yield Found(during, point, order, k, answers.top1, len(labels), True, share)
    alone = respondent.answers(replace(noise, group_size=1), np.arange(len(labels)))
    if point.kind in LINEAR_KINDS:  # the identity: the figure is the one with the noise off
        _check_identity(alone, plain, noise)
    else:
        yield Found(during, point, "any", 1, alone.top1, len(labels), False, None)


def _check_identity(alone: Answers, plain: Answers, noise: NoiseConfig) -> None:
    """Errors: ValueError where k = 1 changes an answer that float32 can be trusted with."""
    differing = np.setdiff1d(alone.sample_ids[alone.predicted != plain.predicted], plain.near_ties)
    if len(differing):
        raise ValueError(
            f"{noise.describe()}: at k = 1 {len(differing)} answers differ from those with the noise off: a fault"
        )
