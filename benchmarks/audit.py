"""What it buys the audit to keep the features before the noise: protocols by the model's tail beside whole passes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.harness import (
    Contestant,
    OnTurn,
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
from benchmarks.memory import MemoryRow, peak_in_new_process, print_memory
from pipeline.answers import Answers
from pipeline.audit import rows
from pipeline.audit.cut import official_place
from pipeline.audit.protocols import Settings, run_protocols
from pipeline.audit.respondent import ModelRespondent, Passes, respondent_of
from pipeline.data.batch import Batch
from pipeline.data.order import class_order
from pipeline.models import ModelConfig, create_model
from pipeline.noise.config import NoiseConfig

_CLASSES = 10
_PARTS = {"nine": Settings(ks=(10,), shuffles=1), "grid": Settings()}
_VICTIMS = 10  # so many times fewer than pictures: protocol 7 at k = 10 is then a pass like the others


@dataclass(frozen=True)
class AuditOptions:
    """The audit's protocols on pictures in memory, so that no decoding hides behind a pass; the weights are random."""

    model: str = "vit_tiny_patch16_224"
    image_size: int = 224
    images: int = 200
    batch: int = 50
    parts: tuple[Literal["nine", "grid"], ...] = ("nine", "grid")
    """All nine protocols at k = 10 with one seed, and the default grid of k and seeds."""
    memory: bool = True
    """Measure too by how much memory grows, at so many pictures and at four times as many."""
    rounds: int = 3
    """Timed rounds of each contestant."""
    work: Path | None = None
    """Folder on the disk that keeps the features; the system's temporary folder if None."""
    note: str = ""
    """Kept in each row, such as `2 CPU cores, shared`."""
    output: Path | None = None
    """JSON lines to add to; benchmarks/results/audit.jsonl if None."""

    def __post_init__(self) -> None:
        for name, least in (("images", 50), ("batch", 1), ("image_size", 16), ("rounds", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least {least}")


class Pictures:
    """A Reader of random pictures, kept in memory."""

    fetches = threaded = False
    samples_sha256 = "random"
    classes = tuple(map(str, range(_CLASSES)))

    def __init__(self, count: int, side: int) -> None:
        self.pixels = torch.randint(256, (count, side, side, 3), dtype=torch.uint8)
        self.labels = np.arange(count) % _CLASSES
        self.shard_sizes: tuple[int, ...] = (count,)

    def __len__(self) -> int:
        return len(self.labels)

    def labels_of(self, sample_ids: np.ndarray) -> np.ndarray:
        return self.labels[sample_ids]

    def batch(self, sample_ids: np.ndarray, epoch: int | None, in_hand: np.ndarray | None = None) -> Batch:
        ids = torch.from_numpy(sample_ids)
        return Batch(self.pixels[ids], torch.from_numpy(self.labels[sample_ids]), ids)

    def where(self, sample_id: int) -> str:
        return f"random picture {sample_id}"

    def expect(self, shards: np.ndarray, keep: bool) -> None: ...


class _Audited:
    """One model and its pictures, audited with features kept or without."""

    def __init__(self, options: AuditOptions, images: int) -> None:
        torch.manual_seed(0)
        self.reader = Pictures(images, options.image_size)
        self.model = create_model(ModelConfig(options.model), _CLASSES, options.image_size).eval()
        self.noise = NoiseConfig("optimal_q", site=official_place(self.model), during="eval")
        self.options = options

    def audit(self, settings: Settings, keep_features: bool) -> list[rows.Row]:
        """All nine protocols: the model stands in for its own twin, which costs a whole pass."""
        with self._respondent(keep_features) as respondent:
            by_class = class_order(self.reader.labels)
            twin = self.whole_pass(respondent)
            return run_protocols(respondent, [self.noise], settings, by_class, twin)

    def nine_passes(self) -> int:
        with self._respondent(keep_features=False) as respondent:
            for _ in range(8):  # and the one that gives the plain answers
                self.whole_pass(respondent)
        return len(self.reader)

    def whole_pass(self, respondent: ModelRespondent) -> Answers:
        return respondent.answers(NoiseConfig(), np.arange(len(self.reader)))

    def _respondent(self, keep_features: bool):
        work = self.options.work or Path(tempfile.gettempdir())
        passes = Passes(self.options.image_size, 0, self.options.batch, 0, work, keep_features)
        return respondent_of(self.model, self.reader, [self.noise.site], passes, _silent)


def _silent(line: str) -> None: ...


def measure_audit(options: AuditOptions, command: Sequence[str]) -> list[Row | MemoryRow]:
    """Measures, writes and prints. Errors: ValueError, OSError naming the file or option and the mend."""
    path = check_output(options.output, "audit")
    circumstances = circumstances_of(command, options.note)
    audited, timed = _Audited(options, options.images), []
    with status_line() as on_turn:
        for part in dict.fromkeys(options.parts):
            settings = replace(_PARTS[part], victims=options.images // _VICTIMS)
            contestants = _contestants(audited, settings, part)
            timings = compare(contestants, options.rounds, _agree, on_turn)
            timed += summarise("audit", part, "pictures", contestants, timings)
        memory = list(_memory(options, on_turn)) if options.memory else []
    conditions = {
        "model": options.model,
        "site": audited.noise.site,
        "image_size": options.image_size,
        "images": options.images,
        "batch": options.batch,
        "victims": options.images // _VICTIMS,
    }
    found: list[Row | MemoryRow] = [*timed, *memory]
    append_rows(path, [row.to_json(circumstances | {"conditions": conditions}) for row in found])
    print_parts(timed)
    print_memory(memory)
    print_circumstances(options.rounds, circumstances)
    print(f"{len(found)} rows, with versions, commit and command, added to {path}")
    return found


def _contestants(audited: _Audited, settings: Settings, part: str) -> list[Contestant]:
    def by(keep_features: bool) -> Contestant:
        def ask() -> list[rows.Row]:
            return audited.audit(settings, keep_features)

        def one_round() -> int:
            ask()
            return len(audited.reader)

        name = "features kept" if keep_features else "whole passes"
        return Contestant(name, one_round, f"all nine protocols, ks {settings.ks}, {settings.shuffles} shuffles", ask)

    nine = Contestant("nine whole passes", audited.nine_passes, "the plain model nine times, nothing asked of it")
    return [nine, by(False), by(True)] if part == "nine" else [by(False), by(True)]


def _agree(one: list[rows.Row], other: list[rows.Row]) -> str | None:
    differing = [f"protocol {a.protocol}, k = {a.k}" for a, b in zip(one, other, strict=True) if a != b]
    return f"other counts: {', '.join(differing)}" if differing else None


def _memory(options: AuditOptions, on_turn: OnTurn) -> Iterator[MemoryRow]:
    """At two numbers of pictures: what grows with them is told from what does not."""
    for images in (options.images, 4 * options.images):
        name = f"{images:,} pictures"
        on_turn(f"{name}: memory")
        peak = peak_in_new_process(partial(_prepare, options, images))
        yield MemoryRow("audit", "memory", name, "features kept, all nine protocols at k = 10, 1 shuffle", *peak)


def _prepare(options: AuditOptions, images: int) -> Callable[[], object]:
    audited = _Audited(options, images)
    _Audited(options, 50).audit(Settings((2,), 1, 0, 10), keep_features=True)  # what torch keeps, whatever the number
    return partial(audited.audit, Settings((10,), 1, 0, images // _VICTIMS), keep_features=True)
