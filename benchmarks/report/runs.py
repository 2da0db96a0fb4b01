"""The section of run folders of `python -m pipeline train`: what each reached, how, and what its audit says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Spread
from benchmarks.report.blocks import Bar, Block, Group, Plot, Section, bars_plot
from benchmarks.report.results import Source, machine_of
from pipeline.audit.plot import draw_accuracies
from pipeline.audit.rows import Row
from pipeline.audit.table import HEADER, NOTES, lines_of
from pipeline.checkpoint import PROGRESS_NAME
from pipeline.intervals import wilson
from pipeline.report.findings import Run, percent, read_run
from pipeline.report.page import curve_of, run_facts
from pipeline.report.plots import draw_training
from pipeline.report.reproduce import shown_path, train_command
from pipeline.sections import from_json

_COLUMNS = (
    "run",
    "model",
    "samples, sha256",
    "noise",
    "per image, top-1 %",
    "95 % interval",
    "n",
    "epochs",
    "images/s",
    "waiting for data",
)


def runs_section(folders: Sequence[Path]) -> Section:
    """Errors: FileNotFoundError, ValueError naming the file and the mend, also where versions differ."""
    if len(set(folder.resolve() for folder in folders)) < len(folders):
        raise ValueError(f"--runs {' '.join(map(str, folders))}: name each run folder once")
    runs = [read_run(folder) for folder in folders]
    _check_alike(runs)
    return Section(
        "runs",
        "Runs of the trainer",
        "What did each run reach per image, noise off, over its validation pictures, and how fast?",
        [Group("", list(_together(runs))), *(Group(shown_path(run.folder), list(_blocks(run))) for run in runs)],
    )


def _check_alike(runs: Sequence[Run]) -> None:
    first = runs[0]
    for other in runs[1:]:
        one, another = first.results["environment"], other.results["environment"]
        for name in dict.fromkeys([*one, *another]):
            if name != "commit" and one.get(name) != another.get(name):
                raise ValueError(
                    f"{other.folder}: {name} {another.get(name)}, and {first.folder} has {one.get(name)}: they would "
                    "stand in one table; report them apart, with an --output each, or train one of them again"
                )


def _training(run: Run) -> Source:
    command = train_command(run.config, run.results["world_size"]).replace(" \\\n", " ")
    return _source(" ".join(command.split()), run.results["environment"])


def _source(command: str, environment: dict[str, str]) -> Source:
    hardware, versions = machine_of(environment)
    return Source(
        command=command,
        time_utc="",
        commit=environment.get("commit", "unknown"),
        uncommitted_changes=None,
        load=None,
        hardware=hardware,
        versions=versions,
        note="",
    )


def _together(runs: Sequence[Run]) -> Iterator[Block]:
    """A table for each set of validation pictures and labels: only what was asked the same stands side by side."""
    asked: dict[str, list[Run]] = {}
    for run in runs:
        asked.setdefault(_validated_on(run), []).append(run)
    words = (
        "Intervals are Wilson's, of the choice of pictures alone: one training each. The digest is of the samples that "
        "the run was trained on and of their labels."
    )
    if len(asked) > 1:
        words += " Runs in different tables were asked other pictures or labels: their figures do not compare."
    for pictures, alike in asked.items():
        yield _side_by_side(alike, f"side by side: {pictures}", words)


def _validated_on(run: Run) -> str:
    """As its configuration and results say: a run keeps no digest of them."""
    data, n = run.config.data, run.accuracy.num_images
    labels = "" if data.label_map is None else f", labels by {_shown_data(str(data.label_map))}"
    return f"{_shown_data(data.val)}, {n:,} pictures of {run.num_classes:,} classes{labels}"


def _trained_on(run: Run) -> str:
    """The digest of the samples and their labels. Errors: ValueError naming the file and the mend."""
    path = run.generation / PROGRESS_NAME
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["samples_sha256"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not say what {run.folder} was trained on ({error}): train it again, or name another folder"
        ) from error


def _shown_data(place: str) -> str:
    return place if "://" in place else shown_path(Path(place))


def _side_by_side(runs: Sequence[Run], title: str, words: str) -> Block:
    lines, bars = [], []
    for run in runs:
        accuracy, (rate, waiting) = run.accuracy, run.throughput
        low, high = (100 * end for end in wilson(accuracy.correct_top1, accuracy.num_images))
        name, top1 = shown_path(run.folder), 100 * accuracy.top1
        bars.append(Bar(name, Spread(top1, low, high), own=True))
        lines.append(
            [
                name,
                run.config.model.name,
                _trained_on(run)[:10],
                run.results["noise_description"],
                f"{top1:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{accuracy.num_images:,}",
                str(run.config.epochs),
                f"{rate:,.0f}",
                percent(waiting, 1),
            ]
        )
    plot = bars_plot(bars, "per image, top-1 %, with 95 % interval")
    return Block(title, _COLUMNS, lines, tuple(map(_training, runs)), words=words, plot=plot)


def _blocks(run: Run) -> Iterator[Block]:
    curve = curve_of(run.folder.name, run)
    yield Block(
        "training",
        ("what", "this run"),
        [*map(list, run_facts(run).items()), ["Trained on", _shown_data(run.config.data.train)]],
        (_training(run),),
        words="The loss is under augmentation and the training noise; the accuracy is per image, noise off.",
        plot=Plot(partial(draw_training, [curve]), "Training loss and validation top-1 over epochs.", large=True),
    )
    if (path := run.folder / "audit" / "audit.json").is_file():
        yield _audit_block(path)


def _audit_block(path: Path) -> Block:
    """Of `python -m pipeline audit`. Errors: ValueError naming the file and the mend."""
    mend = "write it again with `python -m pipeline audit`"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        rows = [_audit_row(row, str(path)) for row in body["rows"]]
        verdict = " ".join(finding["words"] for finding in body["verdict"])
        source = _source(body["command"], body["environment"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): {mend}") from error
    lines = [[f"{line.number}. {line.name}", line.noise, *line.cells] for line in lines_of(rows)]
    return Block(
        "audit",
        (HEADER[0], "noise", *HEADER[1:]),
        lines,
        (source,),
        words=" ".join((verdict, *NOTES)),
        plot=Plot(partial(draw_accuracies, rows), "Accuracy against k; the figures stand in the table.", large=True),
        own=frozenset({0}),
    )


def _audit_row(body: dict[str, Any], where: str) -> Row:
    """Without what follows from the counts."""
    return from_json(Row, {field.name: body[field.name] for field in fields(Row)}, where)
