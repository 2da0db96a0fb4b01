"""What a pretraining, its evaluations and a fine-tuning gave: results.json, report.html and a table.

The headline is the per-image top-1. A figure that depends on the other pictures of a batch is transductive, and stands
with its order and its group size.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from data_prep.manifest import atomic_file
from pipeline.checkpoint import write_json
from pipeline.report.findings import GROUP_SIZE, Findings, read_findings
from pipeline.report.page import render
from pipeline.report.reproduce import shown_path


@dataclass(frozen=True)
class ReportConfig:
    """Writes results.json and report.html of a pretraining, its two noisy evaluations and a fine-tuning."""

    out: Path
    """Folder that gets results.json and report.html."""
    pretrain: Path
    """Run folder of the pretraining."""
    finetune: Path
    """Run folder of the fine-tuning."""
    last_block: Path
    """JSON of `python -m pipeline evaluate` on the pretraining: noise in the last block, all tokens, k = 10."""
    official_place: Path
    """Likewise, noise at the official place: the last block's attention, class token spared."""
    started: float | None = None
    """UNIX time (seconds) at which the whole job began, for `seconds_total`."""


def write_report(config: ReportConfig, stream: TextIO) -> None:
    """Checks the inputs, writes both files and prints the table.

    Errors: FileNotFoundError or ValueError naming the file that is missing, damaged or of another checkpoint.
    """
    if config.out.resolve() in (config.pretrain.resolve(), config.finetune.resolve()):
        raise ValueError(f"out {config.out} is a run folder: its own results.json would be lost, name another folder")
    findings = read_findings(config.pretrain, config.finetune, config.last_block, config.official_place)
    now = time.time()
    if config.started is not None and config.started > now + 1:
        raise ValueError(f"started is {config.started}, which is in the future: give the job's start as UNIX seconds")
    seconds = None if config.started is None else round(now - config.started, 1)
    results = results_of(findings, seconds)
    page = render(findings, config.out, seconds)
    config.out.mkdir(parents=True, exist_ok=True)
    with atomic_file(config.out / "report.html") as file:
        file.write(page.encode())
    write_json(config.out / "results.json", results)
    print_table(findings, config.out, stream)


def results_of(findings: Findings, seconds_total: float | None) -> dict[str, Any]:
    """What results.json holds: fractions from 0 to 1, `seconds_total` None where the start is not known."""
    pretrain, finetune = findings.pretrain, findings.finetune
    rows = findings.rows
    shares = {row.also("class_mate_share"): row.accuracy.class_mate_share for row in rows if row.accuracy.transductive}
    rates = {name: run.throughput for name, run in (("pretrain", pretrain), ("finetune", finetune))}
    return {
        **{row.key: row.accuracy.top1 for row in rows},
        **{row.also("top5"): row.top5 for row in rows},
        **shares,
        "intervals_95": {row.key: list(row.interval) for row in rows},
        "accuracies": {row.key: row.accuracy.to_json() for row in rows},
        "num_eval_images": findings.last_block.per_image.num_images,
        "finetune_num_eval_images": finetune.accuracy.num_images,
        "num_classes": pretrain.num_classes,
        "finetune_num_classes": finetune.num_classes,
        "group_size": GROUP_SIZE,
        "shuffle_seed": findings.last_block.config.shuffle_seed,
        **{name: pretrain.results[name] for name in ("world_size", "engine", "strategy")},
        "model": pretrain.config.model.name,
        "noise": pretrain.results["noise"],
        "noise_description": pretrain.results["noise_description"],
        "finetune_noise": finetune.results["noise"],
        "finetune_noise_description": finetune.results["noise_description"],
        "images_per_second": {name: rate for name, (rate, _) in rates.items()},
        "data_wait_share": {name: waiting for name, (_, waiting) in rates.items()},
        "seconds_total": seconds_total,
        "commit": pretrain.results["environment"].get("commit", "unknown"),
        "environments": findings.environments,
    }


def print_table(findings: Findings, out: Path, stream: TextIO) -> None:
    """The accuracies, what they mean, and where to look next, in 80 columns."""
    console = Console(file=stream, width=80, highlight=False, markup=False, emoji=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("accuracy", no_wrap=True)
    for name in ("k", "mates %", "top-1 %", "95 % interval", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in findings.rows:
        accuracy, (low, high) = row.accuracy, row.interval
        share = "" if accuracy.class_mate_share is None else f"{100 * accuracy.class_mate_share:.1f}"
        table.add_row(
            row.label,
            str(accuracy.group_size),
            share,
            f"{100 * accuracy.top1:.2f}",
            f"{100 * low:.1f} to {100 * high:.1f}",
            str(accuracy.num_images),
            style="bold" if row.key == "top1_per_image" else "",
        )
    console.print(table)
    console.print(findings.meaning)
    console.print(f"\nReport:      {shown_path(out / 'report.html')}", soft_wrap=True)
    console.print(f"TensorBoard: tensorboard --logdir {shlex.quote(shown_path(findings.logdir))}", soft_wrap=True)
