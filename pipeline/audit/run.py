"""`audit`: what an accuracy under a mixing noise is made of, for one checkpoint and one split."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro

from data_prep.manifest import atomic_file
from pipeline.answers import Answers
from pipeline.audit.findings import Audit
from pipeline.audit.markdown import markdown_of
from pipeline.audit.page import page_of
from pipeline.audit.protocols import Settings, check_protocols, run_protocols
from pipeline.audit.respondent import Passes, respondent_of
from pipeline.audit.rows import Row
from pipeline.audit.subject import PAPER_K, LinearKind, Subject, noises_of, published_subject, subject_of
from pipeline.audit.twin import check_twin, differences
from pipeline.audit.verdict import verdict
from pipeline.checkpoint import write_json
from pipeline.data.cache import CacheConfig
from pipeline.data.class_order import ClassOrder, class_ordered
from pipeline.data.loader import load_manifest, open_split
from pipeline.data.reader import PictureReader
from pipeline.evaluator import Evaluator
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector, site_shapes
from pipeline.parallel import Ranks, join_ranks, snapshot_environment
from pipeline.result_file import result_file
from pipeline.sections import to_json
from pipeline.trained import open_checkpoint


@dataclass(frozen=True)
class AuditConfig:
    """Asks what an accuracy under a noise that mixes pictures is made of, by nine protocols: per image, alone, in class
    order, shuffled, one of each class, plain voting, among others, the official figure, and beside a clean twin."""

    checkpoint: tyro.conf.Positional[Path]
    """A run folder (its latest checkpoint) or one checkpoint in it; with --paper a local file of timm's weights."""
    data: tyro.conf.Positional[str]
    """The manifest of the split: a path, or a store's URL."""
    protocols: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    noises: tuple[LinearKind, ...] = ("optimal_q",)
    """Noises that mix pictures, at inference."""
    strength: float | None = None
    """alpha of circular_shift, below 0.5."""
    sites: tuple[str, ...] = ()
    """Where each noise is tried, as noise.site names it. Without any: where the checkpoint was trained with such a
    noise, else the official place of its family (the last block's `attn`, or the last block of `layer4`)."""
    all_tokens: bool = False
    """Mix class and register tokens too, which the official ViT spares."""
    twin: Path | None = None
    """The clean twin: a run folder or checkpoint that was trained alike, without noise. CHECKPOINT is the noisy one."""
    paper: Literal[224, 384] | None = None
    """The official run at this resolution: timm's ViT-B/16, pictures squashed, optimal Q in the last block's attention,
    class token spared, k = 10, class order. Published figures are printed beside one's own."""
    any_order: bool = False
    """Take the data's own order within a class, where that of the file names is not known."""
    ema: bool = False
    """Audit the averaged weights (optim.ema_decay) instead of the last ones, those of the twin too."""
    format: Literal["wds", "ffcv"] = "wds"
    batch: int = 250
    workers: int = 2
    scratch: Path | None = None
    """Folder on a disk with room for the features before the noise; by default the output folder."""
    output: Path | None = None
    """Folder of audit.json, audit.md and audit.html; by default `audit` in the run folder, or beside the weights."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """For data in a store, on this machine; the checkpoint's was the training machine's."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("workers", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}: at least {least}")
        for name in ("noises", "sites"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))  # else rows would stand twice
        if not self.noises:
            raise ValueError("noises is empty: name optimal_q, circular_shift, or both")
        if any(not name.strip() for site in self.sites for name in site.split(",")):
            raise ValueError("sites has an empty name: give places as timm names its modules, such as blocks.11.attn")
        if (self.strength is None) == ("circular_shift" in self.noises):
            what = "needs --strength, its alpha below 0.5" if self.strength is None else "alone takes --strength"
            raise ValueError(f"circular_shift {what}")
        if self.paper is not None:
            self._check_paper()

    def _check_paper(self) -> None:
        fixed = ("sites", "noises", "all_tokens", "twin", "any_order", "ema")
        for name in fixed:
            if getattr(self, name) != AuditConfig.__dataclass_fields__[name].default:
                raise ValueError(f"--paper is the official run, which settles --{name.replace('_', '-')}: leave it out")
        if PAPER_K not in self.protocols.ks:
            raise ValueError(f"--paper is the official run, of k = {PAPER_K}: name it among --ks")


class _Prepared(NamedTuple):
    """What is checked before the first picture goes through the model."""

    subject: Subject
    reader: PictureReader
    noises: list[NoiseConfig]
    order: ClassOrder
    output: Path
    twin: Subject | None


class _Twin(NamedTuple):
    subject: Subject
    answers: Answers
    differences: str


def audit(config: AuditConfig, ranks: Ranks, arguments: Sequence[str] = ()) -> Audit:
    """Runs all protocols and writes audit.json, audit.md and audit.html. arguments: those of the command line.

    Errors: ValueError, OSError naming the option, the file or the sample, and the mend.
    """
    if ranks.world_size > 1:
        raise ValueError(f"audit runs in one process, here are {ranks.world_size} ranks: start it without torchrun")
    begun, device = time.monotonic(), join_ranks(ranks)
    prepared = _prepare(config)
    twin = None if prepared.twin is None else _ask_twin(prepared.twin, prepared.subject, config, device)
    subject, told = prepared.subject, list[str]()

    def tell(line: str) -> None:
        told.append(line)
        print(line, flush=True)

    scratch = config.scratch or prepared.output
    passes = Passes(subject.data.image_size, subject.seed, config.batch, config.workers, scratch)
    sites = [noise.site for noise in prepared.noises]
    with respondent_of(subject.model.to(device), prepared.reader, sites, passes, tell) as respondent:
        answers = None if twin is None else twin.answers
        rows = run_protocols(respondent, prepared.noises, config.protocols, prepared.order.ids, answers, _say)
    if twin is not None and twin.differences:
        remark = f"{rows[-1].remark}; {twin.differences}"
        rows[-1] = replace(rows[-1], unlike=twin.differences, remark=remark)
    command = shlex.join(("python", "-m", "pipeline", "audit", *arguments))
    found = _found(config, prepared, twin, rows, told, command, time.monotonic() - begun)
    write_json(prepared.output / "audit.json", found.to_json())
    for name, text in (("audit.md", markdown_of(found)), ("audit.html", page_of(found))):
        with atomic_file(prepared.output / name) as file:
            file.write(text.encode())
    return found


def _prepare(config: AuditConfig) -> _Prepared:
    """Errors: as audit, all but those of single pictures."""
    paper = config.paper
    if config.output is not None:
        _check_output(config.output)
    subject = (
        subject_of(config.checkpoint, config.ema) if paper is None else published_subject(config.checkpoint, paper)
    )
    output = config.output or subject.home / "audit"
    _check_output(output)
    twin = None if config.twin is None else _open_twin(config.twin, subject, config.ema)
    reader = _reader(config, subject)
    subject.check_classes(config.data, reader.classes)
    noises = noises_of(subject, config.noises, config.strength, config.sites, config.all_tokens)
    check_protocols(len(reader), noises, config.protocols)
    for noise in noises:
        site_shapes(subject.model, noise.site_patterns, subject.data.image_size)
    manifest = load_manifest(config.data, config.cache)
    order = class_ordered(config.data, manifest, reader, config.any_order)
    if config.scratch is not None and not config.scratch.is_dir():
        raise FileNotFoundError(f"scratch {config.scratch} is no folder: make it, or name another")
    result = output / "audit.json"
    result_file(None if config.output is None else result, result, reader.samples_sha256)
    return _Prepared(subject, reader, noises, order, output, twin)


def _check_output(output: Path) -> None:
    """Errors: ValueError where no folder can be there."""
    nearest = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"--output {output}: {nearest} is a file; name a folder, for audit.json, audit.md, audit.html")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--output {output}: {nearest} cannot be written to; name another folder")


def _reader(config: AuditConfig, subject: Subject) -> PictureReader:
    data = replace(subject.data, format=config.format, workers=config.workers, cache=config.cache)
    return open_split(config.data, data, subject.augment, subject.seed)


def _open_twin(source: Path, subject: Subject, ema: bool) -> Subject:
    """Errors: as _prepare, and check_twin's."""
    assert subject.checkpoint is not None, "published weights take no twin"
    check_twin(subject.checkpoint, open_checkpoint(source))
    return subject_of(source, ema)


def _ask_twin(twin: Subject, subject: Subject, config: AuditConfig, device: torch.device) -> _Twin:
    """Its answers per image, by its own preprocessing. Errors: as _prepare."""
    reader = _reader(config, twin)
    twin.check_classes(config.data, reader.classes)
    injector = NoiseInjector(twin.model, NoiseConfig(), twin.data.image_size, twin.seed)
    evaluator = Evaluator(twin.model.to(device), injector, reader, config.batch, config.workers)
    _say("the clean twin, per image")
    assert subject.checkpoint is not None and twin.checkpoint is not None
    found = differences(subject.checkpoint, twin.checkpoint)
    return _Twin(twin, evaluator.alone(Ranks(0, 1, launched=False)), found)


def _say(what: str) -> None:
    print(f"audit: {what}", file=sys.stderr, flush=True)


def _found(
    config: AuditConfig,
    prepared: _Prepared,
    twin: _Twin | None,
    rows: Sequence[Row],
    told: Sequence[str],
    command: str,
    seconds: float,
) -> Audit:
    subject, reader = prepared.subject, prepared.reader
    return Audit(
        model=subject.model_name,
        source=str(subject.source),
        step=None if subject.checkpoint is None else subject.checkpoint.step,
        weights_sha256=subject.weights_sha256,
        image_size=subject.data.image_size,
        data=config.data,
        samples_sha256=reader.samples_sha256,
        num_classes=len(reader.classes),
        class_order=prepared.order.words,
        noises=tuple(prepared.noises),
        rows=tuple(rows),
        verdict=tuple(verdict(rows)),
        twin=None if twin is None else str(twin.subject.source),
        twin_weights_sha256=None if twin is None else twin.subject.weights_sha256,
        published=subject.published,
        features=tuple(told),
        output=str(prepared.output),
        command=command,
        config=to_json(config),
        seconds=round(seconds, 1),
        environment=snapshot_environment(),
    )
