"""What the trainer adds to a bare DDP loop, what ZeRO adds to DDP, and what resuming and saving cost; on CPU ranks.

Aims, stated before anything was measured, for ViT-T at 64 pixels on two ranks: a step takes at most 1.03 times a bare
DDP loop's; ZeRO-1's and ZeRO-2's at most 1.10 times DDP's, where the engine itself, in a bare loop of its own, allows
it; resuming at 99 % of an epoch at most 1.2 times as long as at 1 %; a checkpoint blocks for at most 1.5 times a plain
copy of the state; an epoch of 1.28 million samples is planned for one of 512 ranks in at most 50 ms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.harness import (
    Row,
    Spread,
    append_rows,
    check_output,
    circumstances_of,
    compare,
    figures,
    print_circumstances,
    print_parts,
    print_table,
    ratio,
    read_rows,
    spread,
    status_line,
    summarise,
)
from benchmarks.loader_plan import plan_contestants
from benchmarks.samples import run_data_prep
from benchmarks.train_ranks import Job
from data_prep.manifest import manifest_path
from pipeline.models import ModelConfig, create_model

TIMES = 16  # that each digit is there: an epoch's first and last percent must lie far apart
PLAN_SECONDS = 0.050
_CPU_SECONDS = 0.1  # below which a tick of 10 ms is too coarse


@dataclass(frozen=True)
class TrainOptions:
    """The trainer beside a bare DDP loop and DeepSpeed's engine, in the same ranks, turn by turn. With `--device cuda`
    instead: images/s and MFU of training steps on one GPU (`--device cuda --help`)."""

    parts: tuple[Literal["step", "resume", "checkpoint", "plan"], ...] = ("step", "resume", "checkpoint", "plan")
    """step: the trainer over bare loops; resume: at 1 and 99 % of an epoch; checkpoint: time that a save blocks; plan:
    of an epoch of ImageNet for one of 512 ranks."""
    engines: tuple[str, ...] = (
        "bare ddp",
        "trainer ddp",
        "bare zero1",
        "trainer zero1",
        "bare zero2",
        "trainer zero2",
    )
    """Contestants of `step`, as words in quotes."""
    ranks: int = 2
    """On this machine's CPU cores."""
    model: str = "vit_tiny_patch16_224"
    """timm's name."""
    checkpoint_models: tuple[str, ...] = ("vit_tiny_patch16_224", "vit_small_patch16_224")
    """Of `checkpoint`: what a save takes beside the copy does not grow with the state."""
    image_size: int = 64
    """Side of the pictures."""
    batch: int = 32
    """Pictures of a rank and step."""
    steps: int = 10
    """Steps of a round."""
    rounds: int = 11
    """Timed rounds of each contestant."""
    note: str = ""
    """Kept in each row, such as `no other load`."""
    output: Path | None = None
    """JSON lines to add to; benchmarks/results/train.jsonl if None."""

    def __post_init__(self) -> None:
        for name in ("ranks", "image_size", "batch", "steps", "rounds"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
        for engine in self.engines:
            kind, _, strategy = engine.partition(" ")
            known = ("ddp", "zero1", "zero2") if kind == "bare" else ("ddp", "zero1", "zero2", "zero3")
            if kind not in ("bare", "trainer") or strategy not in known:
                raise ValueError(f"--engines {engine!r}: name such as 'bare ddp', 'trainer ddp' or 'trainer zero1'")


class Aim(NamedTuple):
    """One contestant's time over another's, and what it should be at most; None: stated without an aim."""

    part: str
    contestant: str
    over: str
    at_most: float | None


AIMS = (
    Aim("step", "trainer ddp", "bare ddp", 1.03),
    Aim("step", "trainer zero1", "trainer ddp", 1.10),
    Aim("step", "trainer zero2", "trainer ddp", 1.10),
    Aim("step", "bare zero1", "bare ddp", None),
    Aim("step", "bare zero2", "bare ddp", None),
    Aim("step", "trainer zero1", "bare zero1", None),
    Aim("step", "trainer zero2", "bare zero2", None),
    Aim("resume", "resume at 99 %", "resume at 1 %", 1.2),
    Aim("checkpoint", "save", "bare copy", 1.5),
)


class Found(NamedTuple):
    """An aim beside what was measured."""

    what: str
    measured: Spread  # of time
    cpu: Spread | None  # of rank 0's processor time, which other load on the machine changes less
    at_most: float | None  # of the measured
    unit: str

    def to_json(self, circumstances: dict[str, Any]) -> str:
        spreads = {name: v._asdict() for name, v in self._asdict().items() if isinstance(v, Spread)}
        return json.dumps({"question": "train", "part": "aims"} | self._asdict() | spreads | circumstances)


def measure_trainer(options: TrainOptions, command: Sequence[str]) -> list[Row]:
    """Measures, writes and prints. Errors: ValueError, OSError naming the option and the mend."""
    path = check_output(options.output, "train")
    with torch.device("meta"):  # an unknown one is refused before anything starts
        for name in {options.model, *options.checkpoint_models}:
            create_model(ModelConfig(name), 1, options.image_size)
    circumstances = circumstances_of(command, options.note)
    rows: list[Row] = []
    with status_line() as on_turn:
        if parts := tuple(part for part in options.parts if part != "plan"):
            with tempfile.TemporaryDirectory(prefix="noisynn-benchmark-") as folder:
                on_turn("sharding digits")
                manifests = shard_digits(Path(folder), TIMES)
                on_turn(f"{', '.join(parts)} on {options.ranks} ranks")
                rows += run_ranks(job_of(options, parts, manifests, Path(folder)), options.ranks)
        if "plan" in options.parts:
            contestants = plan_contestants()
            rows += summarise("train", "plan", "plans", contestants, compare(contestants, options.rounds))
    found = findings(rows)
    names = ("ranks", "model", "image_size", "batch", "steps", "rounds")
    kept = circumstances | {"conditions": {name: getattr(options, name) for name in names}}
    lines = [row.to_json(kept) for row in rows] + [one.to_json(kept) for one in found]
    append_rows(path, lines)
    print_parts(rows)
    print_findings(found)
    print_circumstances(rows[0].n, circumstances)
    print(f"{len(lines)} rows, with versions, commit and command, added to {path}")
    return rows


def job_of(options: TrainOptions, parts: tuple[str, ...], manifests: Path, folder: Path) -> Job:
    return Job(
        parts=parts,
        model=options.model,
        image_size=options.image_size,
        batch=options.batch,
        steps=options.steps,
        rounds=options.rounds,
        engines=options.engines,
        checkpoint_models=options.checkpoint_models,
        manifests=manifests,
        runs=folder / "runs",
        rows=folder / "rows.jsonl",
    )


def shard_digits(folder: Path, times: int) -> Path:
    """Folder of the manifests of scikit-learn's digits, each picture of the training split `times` times."""
    pictures, shards = folder / "digits", folder / "shards"
    run_data_prep("digits", "--out", str(pictures))
    for picture in sorted((pictures / "train").glob("*/*.jpg")):
        for i in range(1, times):
            os.link(picture, picture.with_name(f"{picture.stem}-{i}.jpg"))
    for split in ("train", "val"):
        words = ("--source", str(pictures / split), "--out", str(shards), "--split", split)
        run_data_prep("shard", *words)
        assert manifest_path(shards, split).is_file()
    return shards


def run_ranks(job: Job, ranks: int, threads: int | None = None, on_gpus: bool = False) -> list[Row]:
    """The rows that rank 0 writes. threads: of a rank; None: its share of the cores.

    Errors: ValueError where a rank fails, with its reason.
    """
    job.rows.unlink(missing_ok=True)
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads or max(1, len(os.sched_getaffinity(0)) // ranks))}
    program = ("benchmarks.train_ranks", str(job.write(job.rows.with_name("job.json"))))
    said = _stderr_of(
        (sys.executable, *words, *program), environment if on_gpus else environment | {"CUDA_VISIBLE_DEVICES": ""}
    )
    if not job.rows.is_file():  # the status alone does not tell: DeepSpeed can abort while it ends
        reasons = [line for line in said.splitlines() if "error: " in line.lower()]  # of a rank, or Python's
        raise ValueError(f"the ranks of {job.parts[0]} failed: {reasons[0] if reasons else said[-500:]}")
    return [Row.from_json(row) for row in read_rows(job.rows)]


def _stderr_of(words: Sequence[str], environment: dict[str, str]) -> str:
    """Runs torchrun. Where this process is stopped, so are the ranks: torchrun passes SIGTERM on, SIGKILL it cannot."""
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        words, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            return process.communicate()[1]
        except BaseException:
            process.terminate()
            raise


def findings(rows: Sequence[Row]) -> list[Found]:
    """What was asked, in ratios of time, turn by turn, and the plan's seconds."""
    found = []
    for part in dict.fromkeys(row.part for row in rows):
        of_part = {row.contestant: row for row in rows if row.part == part}
        for aim in AIMS:
            if aim.part == part.partition(",")[0] and aim.contestant in of_part and aim.over in of_part:
                one, other = of_part[aim.contestant], of_part[aim.over]
                what = f"{part}: {aim.contestant} over {aim.over}"
                # Items a second of the other over one's: seconds of one over the other's.
                found.append(Found(what, ratio(other, one), _cpu_ratio(one, other), aim.at_most, "x"))
    if plans := [row for row in rows if row.part == "plan"]:
        slowest = max(plans, key=lambda row: row.wall_seconds.median)
        cpu = spread([timing.cpu_seconds for timing in slowest.timings])
        found.append(Found(f"plan: {slowest.contestant}, the slowest", slowest.wall_seconds, cpu, PLAN_SECONDS, "s"))
    return found


def _cpu_ratio(one: Row, other: Row) -> Spread | None:
    """Of processor seconds an item, turn by turn; None where a round is too short to count its ticks."""
    turns = list(zip(one.timings, other.timings, strict=True))
    if min(timing.cpu_seconds for turn in turns for timing in turn) < _CPU_SECONDS:
        return None
    return spread([(t.cpu_seconds / t.items) / (o.cpu_seconds / o.items) for t, o in turns])


def print_findings(found: Sequence[Found]) -> None:
    """Each beside its aim; by the median it is met or not."""
    lines = [
        [
            one.what,
            f"{figures(one.measured)} {one.unit}",
            "" if one.cpu is None else f"{figures(one.cpu)} {one.unit}",
            "" if one.at_most is None else f"at most {one.at_most:g}",
            "" if one.at_most is None else "met" if one.measured.median <= one.at_most else "NOT met",
        ]
        for one in found
    ]
    print_table("train: aims", ["time", "measured", "of the CPU", "aim", ""], lines)
