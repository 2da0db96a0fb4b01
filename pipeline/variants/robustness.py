"""One checkpoint on ImageNet and its variants: per image, noise off, each picture once over all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.answers import Answers
from pipeline.checkpoint import EMA_NAME, WEIGHTS_NAME, recorded_sha256, write_json
from pipeline.data.cache import CacheConfig
from pipeline.data.folder import names_sha256, open_folder
from pipeline.data.loader import DataConfig, open_split
from pipeline.data.reader import PictureReader
from pipeline.evaluator import Evaluator
from pipeline.intervals import Interval, wilson
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.parallel import Ranks, join_ranks, require_same_on_all_ranks, snapshot_environment
from pipeline.result_file import SAMPLES_KEY, result_file
from pipeline.sections import to_json
from pipeline.trained import Checkpoint, load_model, open_checkpoint, require_classes, run_folder
from pipeline.variants.classes import wordnet_classes
from pipeline.variants.corruptions import CORRUPTIONS, Cell, Corruptions, find_cells
from pipeline.variants.layouts import NAMES, Layout, find_layout, flag_of, notes_on
from pipeline.variants.real import accepted_answers, count_real, read_real

_FOLDERS = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch")


@dataclass(frozen=True)
class RobustnessConfig:
    """Evaluates one checkpoint on ImageNet's variants, per image, each read as it was published and unpacked.

    Noise is off. The checkpoint's own preprocessing is used, and its classes must be WordNet ids.
    """

    checkpoint: Path
    """A run folder (its latest checkpoint) or one checkpoint in it."""
    ema: bool = False
    """Evaluate the averaged weights (optim.ema_decay) instead of the last ones."""
    val: str | None = None
    """ImageNet's validation set: a manifest's path or URL, or a folder of class folders."""
    real: Path | None = None
    """ReaL's real.json, which judges the answers to `val` anew."""
    imagenet_v2: Path | None = None
    """One of its three choices, such as imagenetv2-matched-frequency-format-val."""
    imagenet_a: Path | None = None
    """The folder of its 200 WordNet ids; only those classes are told apart."""
    imagenet_r: Path | None = None
    """The folder of its 200 WordNet ids, of which 86 are those of A."""
    imagenet_sketch: Path | None = None
    """The folder of its 1,000 WordNet ids."""
    imagenet_c: Path | None = None
    """The folder of its corruptions, or of their groups."""
    batch: int = 250
    workers: int = 2
    """Decoding threads of each rank."""
    output: Path | None = None
    """The JSON file of the result; by default in the run folder, named after step, weights and sets."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """For `val` in a store."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}: at least 1")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}: at least 0")
        if self.real is not None and self.val is None:
            raise ValueError(f"--real {self.real} labels the validation set anew: give that as --val")
        if all(getattr(self, option) is None for option in NAMES):
            raise ValueError(f"no set to evaluate: give at least one of {', '.join(map(flag_of, NAMES))}")


@dataclass(frozen=True)
class Row:
    """What the answers to one set come to."""

    name: str
    where: str
    classes: int
    pictures: int
    """That count."""
    correct_top1: int
    correct_top5: int | None
    """None for ReaL, which accepts several answers already."""
    calibration_error: float | None
    """Expected, over 15 equal bins; None for ReaL."""
    near_ties: tuple[str, ...]
    """Pictures whose first two classes float32 cannot be trusted to order."""
    samples_sha256: str

    @property
    def top1(self) -> float:
        return self.correct_top1 / self.pictures

    @property
    def top5(self) -> float | None:
        return None if self.correct_top5 is None else self.correct_top5 / self.pictures

    @property
    def top1_interval(self) -> Interval:
        """95 %, Wilson's."""
        return wilson(self.correct_top1, self.pictures)

    def to_json(self) -> dict[str, Any]:
        derived = {name: to_json(getattr(self, name)) for name in ("top1", "top1_interval", "top5")}
        return to_json(self) | derived


@dataclass(frozen=True)
class Robustness:
    """All that was found."""

    rows: tuple[Row, ...]
    cells: dict[Cell, Row]
    """ImageNet-C's, by corruption and severity."""
    corruptions: Corruptions | None
    notes: tuple[str, ...]
    """What of the sets is not as it was published, and what therefore has no mean."""


@dataclass(frozen=True)
class _Set:
    """A set that is open, and which logits its classes are."""

    name: str
    where: str
    reader: PictureReader
    columns: np.ndarray


class _Session:
    """A checkpoint whose sets are opened, all of them before the first is evaluated: a wrong folder ends it at once."""

    def __init__(self, config: RobustnessConfig, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.checkpoint = open_checkpoint(config.checkpoint)
        self.own = wordnet_classes(self.checkpoint.classes, str(config.checkpoint))
        self.data: DataConfig = replace(
            self.checkpoint.data, format="wds", workers=config.workers, cache=config.cache, on_bad_sample="stop"
        )
        self.augment = self.checkpoint.augment.for_evaluation()
        self.notes: list[str] = []
        if not self.own.is_imagenet:
            self.notes.append(
                f"the checkpoint's {len(self.own.names)} classes are not ImageNet's: no set is as published"
            )
        self.sets = [self._open_validation(config.val)] if config.val is not None else []
        for option in _FOLDERS:
            root = getattr(config, option)
            if root is not None:
                self.sets.append(self._open(find_layout(option, root, self.own)))
        self.accepted = None
        if config.real is not None:
            self.accepted = accepted_answers(self.sets[0].reader.source, read_real(config.real, self.own))
        self.samples = {opened.name: opened.reader.samples_sha256 for opened in self.sets}
        self.cells = self._survey(config.imagenet_c) if config.imagenet_c is not None else {}

    def evaluate(self) -> Robustness:
        model = load_model(self.checkpoint, self.config.ema)
        injector = NoiseInjector(model, NoiseConfig(), self.data.image_size, self.checkpoint.seed)
        model.to(join_ranks(self.ranks))
        require_same_on_all_ranks(self.samples, self.ranks)

        def answers_to(opened: _Set) -> Answers:
            batch, workers = self.config.batch, self.config.workers
            evaluator = Evaluator(model, injector, opened.reader, batch, workers, columns=opened.columns)
            answers = evaluator.alone(self.ranks)
            opened.reader.close()
            return answers

        rows = []
        for opened in self.sets:
            answers = answers_to(opened)
            rows.append(_row(opened, answers))
            if opened is self.sets[0] and self.accepted is not None:
                rows.append(self._real_row(opened, answers, self.accepted))
        cells = {}
        for cell, layout in self.cells.items():
            opened = self._open(layout, "/".join(("ImageNet-C", *cell)))
            require_same_on_all_ranks({opened.name: opened.reader.samples_sha256}, self.ranks)
            cells[cell] = _row(opened, answers_to(opened))
        corruptions = Corruptions({cell: row.top1 for cell, row in cells.items()}, self.own.is_imagenet)
        missing = corruptions.missing if cells else ()
        if missing:
            self.notes.append(f"ImageNet-C: {', '.join(missing)} missing, so there is no mean over all")
        return Robustness(tuple(rows), cells, corruptions if cells else None, tuple(self.notes))

    def _open(self, layout: Layout, name: str | None = None) -> _Set:
        reader = open_folder(layout.root, layout.folders, layout.classes, self.data, self.augment, self.checkpoint.seed)
        if name is None:
            self.notes += notes_on(layout, len(reader), self.own)
        return _Set(name or NAMES[layout.option], str(layout.root), reader, layout.columns)

    def _open_validation(self, where: str) -> _Set:
        if Path(where).is_dir():
            return self._open(find_layout("val", Path(where), self.own))
        reader = open_split(where, self.data, self.augment, self.checkpoint.seed)
        require_classes(f"--val {where}", reader.classes, self.checkpoint)
        columns = np.arange(len(reader.classes))
        layout = Layout("val", Path(where), reader.classes, reader.classes, columns)
        self.notes += notes_on(layout, len(reader), self.own)
        return _Set(NAMES["val"], where, reader, columns)

    def _survey(self, root: Path) -> dict[Cell, Layout]:
        """The cells of ImageNet-C, their names looked through but no picture: an hour later is too late to miss some.

        Errors: as find_cells and find_layout; ValueError for cells that are not of the same pictures.
        """
        cells = {cell: find_layout("imagenet_c", folder, self.own) for cell, folder in find_cells(root).items()}
        first: tuple[Path, int, str] | None = None
        for layout in cells.values():
            count, digest = names_sha256(layout.root, layout.folders)
            if first is None:
                first = layout.root, count, digest
                self.samples[NAMES[layout.option]] = digest
                self.notes += notes_on(layout, count, self.own)
            elif digest != first[2]:
                raise ValueError(
                    f"{layout.root} has {count:,} pictures, {first[0]} {first[1]:,}, not all by the same names: every "
                    "corruption has the same; unpack ImageNet-C again"
                )
        return cells

    def _real_row(self, opened: _Set, answers: Answers, accepted: list[frozenset[int]]) -> Row:
        place = {name: i for i, name in enumerate(self.own.names)}
        index_of = np.array([place[name] for name in opened.reader.classes])
        answers = answers.by_id()
        right, counted = count_real(index_of[answers.predicted], accepted)
        if not counted:
            raise ValueError(
                f"--real {self.config.real} has no label for any picture of {opened.where}: fetch it again"
            )
        row = replace(_row(opened, answers), name="ImageNet-ReaL", pictures=counted, correct_top1=right)
        return replace(row, correct_top5=None, calibration_error=None)


def _row(opened: _Set, answers: Answers) -> Row:
    return Row(
        opened.name,
        opened.where,
        len(opened.columns),
        len(answers),
        answers.top1,
        answers.top5,
        answers.calibration_error(),
        tuple(map(opened.reader.where, answers.near_ties.tolist())),
        opened.reader.samples_sha256,
    )


def evaluate_variants(config: RobustnessConfig, ranks: Ranks) -> Robustness:
    """The sets that `config` names, in the order of its fields. Under torchrun each rank takes its share, and 0 writes.

    Errors: ValueError, OSError naming the option or file and the mend, before anything is evaluated where a set's
    layout is not the published one.
    """
    session = _Session(config, ranks)
    if ranks.rank == 0:
        output = result_file(config.output, _default_output(config, session.checkpoint), session.samples)
    found = session.evaluate()
    if ranks.rank == 0:
        write_json(output, {SAMPLES_KEY: session.samples} | _report(config, session.checkpoint, found))
    return found


def _default_output(config: RobustnessConfig, checkpoint: Checkpoint) -> Path:
    given = [option.replace("_", "-") for option in (*NAMES, "real") if getattr(config, option) is not None]
    parts = [f"step{checkpoint.step}", *(["ema"] if config.ema else []), *given]
    return run_folder(checkpoint) / f"robustness_{'_'.join(parts)}.json"


def _report(config: RobustnessConfig, checkpoint: Checkpoint, found: Robustness) -> dict[str, Any]:
    return {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "weights_sha256": recorded_sha256(checkpoint.folder, EMA_NAME if config.ema else WEIGHTS_NAME),
        "config": to_json(config),
        "sets": [row.to_json() for row in found.rows],
        "imagenet_c": None if found.corruptions is None else _corruptions_json(found.corruptions, found.cells),
        "notes": list(found.notes),
        "environment": snapshot_environment(),
    }


def _corruptions_json(found: Corruptions, cells: dict[Cell, Row]) -> dict[str, Any]:
    return {
        "cells": [{"corruption": cell[0], "severity": int(cell[1])} | row.to_json() for cell, row in cells.items()],
        "mean_top1_of": {name: found.mean_of(name) for name in found.names},
        "mean_top1": found.mean,
        "mean_over": list(CORRUPTIONS),
        "mce": found.mce,
        "missing": list(found.missing),
    }
