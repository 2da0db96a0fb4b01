"""report.html: one file, its pictures inside, nothing from the network."""

from __future__ import annotations

import base64
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.page import render_page
from pipeline.page.drawing import plot_uris
from pipeline.report.findings import Findings, Run, percent
from pipeline.report.plots import Curve, Point, draw_accuracies, draw_training
from pipeline.report.reproduce import evaluate_command, shown_path, train_command

_TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
_GRID_TAG = "input/step_0"
_GRID_PIXELS = 448  # the picture grid is enlarged by a whole factor up to this width


def render(findings: Findings, out: Path, seconds_total: float | None) -> str:
    """The page, whole. `out` is the folder that it will lie in. Errors: ValueError where a run has no pictures."""
    runs = (("Pretraining", findings.pretrain), ("Fine-tuning", findings.finetune))
    return render_page(
        _TEMPLATE,
        {"percent": percent, "interval": _interval, "quoted": shlex.quote},
        name=out.resolve().name,
        headline=findings.rows[0],
        rows=findings.rows,
        meaning=findings.meaning,
        shuffle_seed=findings.last_block.config.shuffle_seed,
        plots=_plots(findings),
        grids=[_grid(title, run) for title, run in runs],
        facts=_facts(findings),
        versions=_versions(findings.environments),
        seconds_total=seconds_total,
        commands=_commands(findings),
        last_block=findings.last_block.class_ordered.noise,
        official_place=findings.official_place.class_ordered.noise,
        out=shown_path(out),
        pretrain=shown_path(findings.pretrain.folder),
        finetune=shown_path(findings.finetune.folder),
        logdir=shown_path(findings.logdir),
    )


def _plots(findings: Findings) -> dict[str, dict[str, str]]:
    """Plot -> mode -> data URI."""
    runs = (("Pretraining", findings.pretrain), ("Fine-tuning", findings.finetune))
    curves = [curve_of(title, run) for title, run in runs]
    points = [Point(row.label, row.accuracy.top1, *row.interval, row.accuracy.transductive) for row in findings.rows]
    return {
        "training": plot_uris(partial(draw_training, curves)),
        "accuracies": plot_uris(partial(draw_accuracies, points)),
    }


def curve_of(title: str, run: Run) -> Curve:
    """Loss and accuracy over a run's epochs."""
    losses, validations = run.logged, run.validated
    steps_per_epoch = losses[-1]["step"] / losses[-1]["train/epoch"]
    return Curve(
        f"{title} ({run.num_classes} classes)",
        [line["train/epoch"] for line in losses],
        [line["train/loss"] for line in losses],
        [line["step"] / steps_per_epoch for line in validations],
        [line["val/top1"] for line in validations],
    )


def _grid(title: str, run: Run) -> dict[str, Any]:
    """The picture grid of step 0 from the run's TensorBoard events."""
    events = EventAccumulator(str(run.folder), size_guidance={"images": 0})
    events.Reload()
    if _GRID_TAG not in events.Tags()["images"]:
        raise ValueError(f"{run.folder}: its events hold no picture {_GRID_TAG}: train again, into an empty folder")
    image = events.Images(_GRID_TAG)[0]
    noise = run.config.noise
    shows_noise = noise.active(training=True) and noise.site == "image"
    return {
        "title": title,
        "uri": "data:image/png;base64," + base64.b64encode(image.encoded_image_string).decode(),
        "width": image.width * max(1, _GRID_PIXELS // image.width),
        "noise": noise.describe(),
        "shows_noise": shows_noise,
        "inside": noise.active(training=True) and not shows_noise,
    }


def _facts(findings: Findings) -> list[tuple[str, str, str]]:
    """(what, of the pretraining, of the fine-tuning)."""
    columns = [run_facts(run) for run in (findings.pretrain, findings.finetune)]
    return [(name, columns[0][name], columns[1][name]) for name in columns[0]]


def run_facts(run: Run) -> dict[str, str]:
    """What a run was, in words."""
    config, results = run.config, run.results
    options = ", ".join(f"{name} {value}" for name, value in config.model.options.items())
    start = "random weights" if config.model.init_from is None else shown_path(config.model.init_from)
    start = "timm's public weights" if config.model.pretrained else start
    rate, waiting = run.throughput
    return {
        "Model (timm)": f"{config.model.name}{f' ({options})' if options else ''}",
        "Starting weights": start + (", new head" if config.model.new_head else ""),
        "Data": f"{results['num_train_images']:,} training and {results['num_eval_images']:,} validation pictures, "
        f"{run.num_classes} classes, {config.data.image_size} px, {config.data.format}",
        "Noise": results["noise_description"],
        "Length": f"{config.epochs} epochs, {results['steps']:,} steps",
        "World size": f"{results['world_size']} ranks" if results["world_size"] != 1 else "1 rank",
        "Engine": f"{results['engine']}, {results['strategy']}, {config.parallel.precision}",
        "Global batch": f"{config.global_batch} images (micro-batch {config.micro_batch} a rank)",
        "Throughput": f"{rate:,.0f} images/s",
        "Waiting for data": f"{percent(waiting, 1)} of training time",
        "Run folder": shown_path(run.folder),
    }


def _versions(environments: dict[str, dict[str, str]]) -> list[tuple[str, str]]:
    """(name, version); where the parts differ, each version with the parts it is of. Shared ones of libraries first."""
    names = dict.fromkeys(name for environment in environments.values() for name in environment)
    rows, libraries = [], []
    for name in names:
        parts: dict[str, list[str]] = {}
        for part, environment in environments.items():
            parts.setdefault(environment.get(name, "unknown"), []).append(part)
        if len(parts) > 1:
            rows.append((name, "; ".join(f"{version} ({', '.join(of)})" for version, of in parts.items())))
        elif name in ("device", "commit"):
            rows.append((name, next(iter(parts))))
        else:
            libraries.append(f"{name} {next(iter(parts))}")
    return [("Versions", ", ".join(libraries)), *((name.capitalize(), version) for name, version in rows)]


def _commands(findings: Findings) -> str:
    lines = [train_command(run.config, run.results["world_size"]) for run in (findings.pretrain, findings.finetune)]
    lines += [evaluate_command(evaluation.config) for evaluation in (findings.last_block, findings.official_place)]
    return "\n\n".join(lines)


def _interval(bounds: tuple[float, float]) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"
