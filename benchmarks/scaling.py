"""Weak scaling of the trainer over the ranks at hand, and its projection to hundreds of GPUs.

Measured: the same work for each rank, on 1, 2, 4, ... ranks with a core (or GPU) each, started in turn; efficiency is
one rank's seconds over many ranks', formed within a turn. Projected: by benchmarks.projection, from one rank's step as
it was measured here or as it is given; its assumptions are printed and kept beside each figure.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import (
    Row,
    Spread,
    append_rows,
    check_output,
    circumstances_of,
    figures,
    print_table,
    spread,
    status_line,
)
from benchmarks.projection import Network, Projected, project
from benchmarks.train import TIMES, run_ranks, shard_digits
from benchmarks.train_ranks import Job
from pipeline.models import ModelConfig, create_model

CLASSES = 10  # of the digits
GPUS = (2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class ScalingOptions:
    """Weak scaling over the ranks at hand, and a projection for 2 to 512 GPUs from one's step."""

    ranks: tuple[int, ...] = ()
    """Measured, the first against the others. Nothing: 1, 2, 4, ... up to this machine's GPUs, or cores."""
    strategy: str = "ddp"
    """The trainer's: ddp, zero1, zero2 or zero3."""
    model: str = "vit_tiny_patch16_224"
    """timm's name."""
    image_size: int = 64
    """Side of the pictures."""
    batch: int = 32
    """Pictures of a rank and step."""
    steps: int = 10
    """Steps of a round."""
    rounds: int = 5
    """Turns, each with a start of its own for each number of ranks."""
    step_seconds: float | None = None
    """Of one GPU, to project from; nothing is measured then."""
    gradient_bytes: int | None = None
    """Of all parameters. None: 4 for each of the model's."""
    gpus: tuple[int, ...] = GPUS
    """To project to."""
    gpus_per_node: int = Network.gpus_per_node
    """GPUs that a node's fast links join."""
    node_gigabytes_per_second: float = Network.node_gigabytes_per_second
    """Of a GPU's links within its node, for each direction."""
    node_latency_us: float = Network.node_latency_us
    """Of a message within the node."""
    gigabytes_per_second: float = Network.gigabytes_per_second
    """Of a GPU's share of its node's network, for each direction; 50 is 400 Gbit/s."""
    latency_us: float = Network.latency_us
    """Of a message between nodes."""
    bucket_megabytes: float = Network.bucket_megabytes
    """Of gradients that are summed at once."""
    overlap: float = Network.overlap
    """Share of the backward pass that hides summing, 0 to 1."""
    note: str = ""
    """Kept in each row, such as `no other load`."""
    output: Path | None = None
    """JSON lines to add to; benchmarks/results/scaling.jsonl if None."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch", "steps", "rounds"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
        if len(set(self.ranks)) < len(self.ranks) or any(ranks < 1 for ranks in self.ranks):
            raise ValueError(f"--ranks {' '.join(map(str, self.ranks))}: numbers from 1, each once")
        if self.strategy not in ("ddp", "zero1", "zero2", "zero3"):
            raise ValueError(f"--strategy {self.strategy}: ddp, zero1, zero2 or zero3")
        for name in ("step_seconds", "gradient_bytes"):
            if (given := getattr(self, name)) is not None and not 0 < given < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {given}: above 0")
        for gpus in self.gpus:  # before anything is measured
            project(1.0, 1.0, gpus, self.network)

    @property
    def network(self) -> Network:
        return Network(**{field.name: getattr(self, field.name) for field in fields(Network)})


class Scaled(NamedTuple):
    """One number of ranks."""

    ranks: int
    step_seconds: Spread
    images_per_second: Spread  # of all ranks
    efficiency: Spread  # turn by turn
    interval: tuple[float, float] | None  # 95 % of the mean efficiency; None for fewer than three turns


def measure_scaling(options: ScalingOptions, command: Sequence[str]) -> list[Scaled]:
    """Measures or takes one rank's step, projects, writes and prints. Errors: ValueError, OSError naming the option."""
    path = check_output(options.output, "scaling")
    circumstances = circumstances_of(command, options.note)
    gradient_bytes = options.gradient_bytes or 4 * _elements(options)
    scaled = [] if options.step_seconds is not None else weak_scaling(options)
    step_seconds = options.step_seconds or scaled[0].step_seconds.median
    projected = [project(step_seconds, gradient_bytes, gpus, options.network) for gpus in options.gpus]
    basis = {
        "step_seconds": step_seconds,
        "step_from": f"measured here on {scaled[0].ranks} rank{'s'[: scaled[0].ranks - 1]}" if scaled else "given",
        "gradient_bytes": gradient_bytes,
        "network": asdict(options.network),
        "assumptions": options.network.assumptions,
    }
    conditions = {name: getattr(options, name) for name in ("strategy", "model", "image_size", "batch", "steps")}
    kept = circumstances | {"conditions": conditions | {"device": _device()}, "n": options.rounds}
    lines = [_line("measured", one._asdict(), kept) for one in scaled]
    append_rows(path, lines + [_line("projected", one._asdict() | basis, kept) for one in projected])
    _print(scaled, projected, basis)
    print(f"{len(scaled) + len(projected)} rows, with versions, commit and command, added to {path}")
    return scaled


def _line(part: str, body: dict[str, Any], kept: dict[str, Any]) -> str:
    values = {name: value._asdict() if isinstance(value, Spread) else value for name, value in body.items()}
    return json.dumps({"question": "scaling", "part": part} | values | kept)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _elements(options: ScalingOptions) -> int:
    """Errors: ValueError for a model that timm does not know."""
    with torch.device("meta"):
        model = create_model(ModelConfig(options.model), CLASSES, options.image_size)
    return sum(parameter.numel() for parameter in model.parameters())


def ranks_at_hand() -> tuple[int, ...]:
    """1, 2, 4, ... up to the GPUs of this machine, or its cores."""
    most = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    return tuple(2**power for power in range(most.bit_length()))


def weak_scaling(options: ScalingOptions) -> list[Scaled]:
    """Turns of one start for each number of ranks, which differ in nothing but their number."""
    numbers = options.ranks or ranks_at_hand()
    turns: dict[int, list[Row]] = {ranks: [] for ranks in numbers}
    with tempfile.TemporaryDirectory(prefix="noisynn-benchmark-") as name, status_line() as on_turn:
        folder = Path(name)
        on_turn("sharding digits")
        job = Job(
            parts=("step",),
            model=options.model,
            image_size=options.image_size,
            batch=options.batch,
            steps=options.steps,
            rounds=1,
            engines=(f"trainer {options.strategy}",),
            checkpoint_models=(),
            manifests=shard_digits(folder, TIMES),
            runs=folder,
            rows=folder / "rows.jsonl",
        )
        for number in range(options.rounds):
            for ranks in numbers:
                on_turn(f"{ranks} ranks: turn {number + 1} of {options.rounds}")
                own = replace(job, runs=folder / f"runs-{number}-{ranks}")
                turns[ranks] += run_ranks(own, ranks, threads=1, on_gpus=_device() == "cuda")
    return summarise_turns(turns, options.steps)


def summarise_turns(turns: dict[int, list[Row]], steps: int) -> list[Scaled]:
    """turns: number of ranks -> a row for each turn. The first number is what the others are compared with."""
    first = [row.wall_seconds.median for row in next(iter(turns.values()))]
    found = []
    for ranks, rows in turns.items():
        seconds = [row.wall_seconds.median for row in rows]
        efficiency = [alone / together for alone, together in zip(first, seconds, strict=True)]
        found.append(
            Scaled(
                ranks=ranks,
                step_seconds=spread([value / steps for value in seconds]),
                images_per_second=spread([row.items_per_second.median for row in rows]),
                efficiency=spread(efficiency),
                interval=interval_of(efficiency),
            )
        )
    return found


def interval_of(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean, by Student's t; None for fewer than three values."""
    if len(values) < 3:
        return None
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def _print(scaled: Sequence[Scaled], projected: Sequence[Projected], basis: dict[str, Any]) -> None:
    if scaled:
        header = ["ranks", "s a step", "images/s of all", "efficiency", "95 % of its mean"]
        lines = [
            [
                str(one.ranks),
                figures(one.step_seconds),
                figures(one.images_per_second),
                figures(one.efficiency),
                "" if one.interval is None else f"{one.interval[0]:.3f} to {one.interval[1]:.3f}",
            ]
            for one in scaled
        ]
        print_table("scaling: measured, the same work for each rank", header, lines)
    header = ["GPUs", "ms summing", "ms not hidden", "ms a step", "efficiency"]
    lines = [
        [str(one.gpus), *(f"{1e3 * value:.3g}" for value in one[1:4]), f"{100 * one.efficiency:.1f} %"]
        for one in projected
    ]
    print_table("scaling: projected", header, lines)
    print(f"from a step of {1e3 * basis['step_seconds']:.4g} ms ({basis['step_from']})", end="")
    print(f" and {basis['gradient_bytes'] / 1e6:,.1f} MB of gradients, assuming that")
    print("\n".join(f"- {assumption}" for assumption in basis["assumptions"]))
