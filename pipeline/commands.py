"""The command lines: tyro turns recipes and dataclasses into options, and each command calls one function."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.table import Table

from pipeline.checkpoint import Generation, export_universal
from pipeline.config import TrainConfig
from pipeline.evaluate import EvaluateConfig, evaluate
from pipeline.evaluation_table import print_evaluation
from pipeline.parallel import guard_rank, launch, launched_here, quiet_libraries, ranks_from_environment
from pipeline.recipes import all_recipes
from pipeline.train import check, run_training
from pipeline.trained import load_model, open_checkpoint

if TYPE_CHECKING:  # their module brings scipy, which only `entropy` needs
    from pipeline.information import InformationRow
    from pipeline.noise.entropy import Interval


def train_command(arguments: list[str]) -> int:
    """Checks the configuration in one process, then starts the ranks; under torchrun this is one of them."""
    recipes = {name: (recipe.summary, recipe.config) for name, recipe in all_recipes().items()}
    config: TrainConfig = tyro.extras.overridable_config_cli(recipes, prog="python -m pipeline train", args=arguments)
    quiet_libraries()
    ranks = ranks_from_environment()
    if ranks.launched:
        guard_rank()
        if not launched_here():  # torchrun's ranks have not been looked at
            check(config, ranks.world_size)
        return run_training(config, ranks)
    check(config, config.parallel.processes)
    return launch(["train", *arguments], config.parallel.processes)


def evaluate_command(arguments: list[str]) -> int:
    config = tyro.cli(EvaluateConfig, prog="python -m pipeline evaluate", args=arguments)
    ranks = ranks_from_environment()
    found = evaluate(config, ranks)
    if ranks.rank == 0:
        print_evaluation(found)
    return 0


def entropy_command(arguments: list[str]) -> int:
    from pipeline.information import EntropyConfig, measure_information

    config = tyro.cli(EntropyConfig, prog="python -m pipeline entropy", args=arguments)
    print_information(measure_information(config, ranks_from_environment()))
    return 0


def print_information(rows: list[InformationRow]) -> None:
    """A table of definition beside measurement, where they disagree, and what the definition does not say."""
    from pipeline.information import caveats

    def nats(*off_and_on: Interval) -> str:
        return "\n".join(f"{i.nats:.3f} ±{max(i.high - i.nats, i.nats - i.low):.3f}" for i in off_and_on)

    table = Table("noise", "order", "k", "dS by definition", "", "I(Y;Z)", "probe: at least")
    for r in rows:
        table.add_row(
            r.kind if r.level is None else f"{r.kind} {r.level:g}",
            r.order if r.transductive else "any",
            str(r.k),
            f"{r.entropy_change_nats:.4g} {r.verdict}",
            "off\non",
            nats(r.clean, r.noisy),
            nats(r.clean_probe_bound, r.noisy_probe_bound),
        )
    Console().print(table)
    units = ", ".join(sorted({r.per for r in rows}))
    print(f"In nats, ± for 95 %. dS is of one {units}; I(Y;Z) of one sample, with the noise off and on.")
    print(f"H(Y) = {rows[0].label_entropy_nats:.3f}, n = {rows[0].num_images}.")
    for sentence in [*filter(None, (row.disagreement for row in rows)), *caveats(rows)]:
        print(sentence)


def audit_command(arguments: list[str]) -> int:
    from pipeline.audit.run import AuditConfig, audit
    from pipeline.audit.table import print_audit

    config = tyro.cli(AuditConfig, prog="python -m pipeline audit", args=arguments)
    print_audit(audit(config, ranks_from_environment(), arguments))
    return 0


def robustness_command(arguments: list[str]) -> int:
    from pipeline.variants import RobustnessConfig, evaluate_variants, print_robustness

    config = tyro.cli(RobustnessConfig, prog="python -m pipeline robustness", args=arguments)
    ranks = ranks_from_environment()
    found = evaluate_variants(config, ranks)
    if ranks.rank == 0:
        print_robustness(found)
    return 0


@dataclass(frozen=True)
class ExportConfig:
    """Writes a checkpoint for others to read.

    timm: its weights, for `timm.create_model(...).load_state_dict(..., strict=True)`. deepspeed-universal: its whole
    state, which DeepSpeed loads at any world size with `checkpoint: {load_universal: true}`.
    """

    checkpoint: Path
    """A run folder or one checkpoint in it."""
    output: Path
    """The .safetensors file to write; for deepspeed-universal a folder, new or empty."""
    format: Literal["timm", "deepspeed-universal"] = "timm"
    ema: bool = False
    """timm: the averaged weights (optim.ema_decay) instead of the last ones."""


def export_command(arguments: list[str]) -> int:
    import torch
    from safetensors.torch import save

    from data_prep.manifest import atomic_file

    config = tyro.cli(ExportConfig, prog="python -m pipeline export", args=arguments)
    if config.format == "deepspeed-universal":
        return _export_universal(config)
    if config.output.suffix != ".safetensors":
        raise ValueError(f"output {config.output}: the name must end in .safetensors")
    checkpoint = open_checkpoint(config.checkpoint)
    model = load_model(checkpoint, config.ema)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    metadata = {
        "timm_model": checkpoint.model.name,
        "timm_options": str(checkpoint.model.options),
        "num_classes": str(len(checkpoint.classes)),
        "image_size": str(checkpoint.data.image_size),
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(config.output) as file:
        file.write(save(weights, metadata))
    parameters = sum(t.numel() for t in weights.values() if isinstance(t, torch.Tensor))
    print(f"{config.output}: {len(weights)} tensors, {parameters:,} values, for timm's {checkpoint.model.name}")
    return 0


def _export_universal(config: ExportConfig) -> int:
    if config.ema:
        raise ValueError("--ema: DeepSpeed's format has no averaged weights; export them with --format timm")
    folder = open_checkpoint(config.checkpoint).folder
    generation = Generation(folder)
    generation.verify()
    written = export_universal(generation, config.output)
    print(f"{written}: {folder.name} in DeepSpeed's universal format")
    return 0


def report_command(arguments: list[str]) -> int:
    from pipeline.report import ReportConfig, write_report

    config = tyro.cli(ReportConfig, prog="python -m pipeline report", args=arguments)
    write_report(config, sys.stdout)
    return 0
