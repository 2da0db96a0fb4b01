"""The ranks of `python -m benchmarks train` and `scaling`: all contestants in the same processes, turn by turn.

Started under torchrun by `benchmarks.train`, with a job's file as the one argument; rank 0 writes the rows.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.harness import Contestant, compare, summarise
from benchmarks.train_bare import BareLoop, bare_ddp, bare_deepspeed
from pipeline.build import Training, build, open_data, run_layout
from pipeline.config import TrainConfig
from pipeline.data.loader import DataConfig, TrainLoader
from pipeline.models import ModelConfig
from pipeline.parallel import ParallelConfig, Ranks, join_ranks, leave, quiet_libraries, ranks_from_environment
from pipeline.sections import from_json, to_json
from pipeline.train import finish_saving, save, train_epoch

SAME_LOSS = 1e-4  # of about 2.3: the contestants start from the same weights on the same batch


@dataclass(frozen=True)
class Job:
    """What the ranks do, as `benchmarks.train` writes it."""

    parts: tuple[str, ...]
    model: str
    image_size: int
    batch: int  # of each rank
    steps: int
    rounds: int
    engines: tuple[str, ...]  # "trainer NAME", "bare ddp", "bare zero1", ...
    checkpoint_models: tuple[str, ...]
    manifests: Path
    runs: Path
    rows: Path

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(to_json(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        return from_json(cls, json.loads(path.read_text()), str(path))

    def config(self, name: str, world_size: int, strategy: str = "ddp") -> TrainConfig:
        """The same training for all; `name`: of its run's folder."""
        return TrainConfig(
            run=self.runs / name,
            epochs=1000,
            global_batch=self.batch * world_size,
            micro_batch=self.batch,
            model=ModelConfig(self.model),
            data=DataConfig(
                train=str(self.manifests / "train.manifest.json"),
                val=str(self.manifests / "val.manifest.json"),
                image_size=self.image_size,
                workers=1,
            ),
            parallel=ParallelConfig(strategy=strategy, precision="fp32", processes=world_size),  # type: ignore[arg-type]
        )


class TrainerLoop:
    """Rounds of the trainer's own loop, with all that it does beside the step: ledger, agreement, watchdog, metrics."""

    def __init__(self, run: Training) -> None:
        self.run = run
        self.last_loss = float("nan")

    def round(self, steps: int) -> float:
        """Takes so many steps; returns the mean loss since the last line of metrics, over all ranks."""
        run = self.run
        run.config = replace(run.config, stop_after_steps=run.step + steps)
        while run.step < run.last_step:
            train_epoch(run, self, lambda: None)  # type: ignore[arg-type]
        return self.last_loss

    def show(self, epoch: int, loss: float) -> None:
        """In place of the progress bar."""
        self.last_loss = loss

    def advance(self) -> None: ...


def built(config: TrainConfig, ranks: Ranks) -> Training:
    """A trainer beside others in one process, which Accelerate does not foresee: its state is global."""
    forget_accelerate()
    if ranks.rank == 0:
        config.run.mkdir(parents=True, exist_ok=True)
    meet(ranks)
    return build(config, ranks)


def forget_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def meet(ranks: Ranks) -> None:
    if ranks.world_size > 1:
        dist.barrier()


# ---- steps ----


def step_contestants(job: Job, ranks: Ranks) -> list[Contestant]:
    settings = f"{job.model} at {job.image_size} pixels, {job.batch} pictures a rank, {ranks.world_size} ranks, fp32"
    return [
        Contestant(
            name=engine,
            round=partial(_steps, loop, job.steps, job.batch * ranks.world_size),
            settings=settings,
            output=partial(_mean, loop, ranks),
            between=partial(meet, ranks),
        )
        for engine in job.engines
        for loop in (_loop_of(engine, job, ranks),)
    ]


def _loop_of(engine: str, job: Job, ranks: Ranks) -> TrainerLoop | BareLoop:
    kind, strategy = engine.split()
    config = job.config(engine.replace(" ", "-"), ranks.world_size, strategy)
    if kind == "trainer":
        return TrainerLoop(built(config, ranks))
    loader = TrainLoader(open_data(config)[0], run_layout(config, ranks), config.seed, config.data.workers)
    if strategy == "ddp":
        return bare_ddp(config, loader)
    return bare_deepspeed(config, loader, stage=int(strategy.removeprefix("zero")))


def _steps(loop: TrainerLoop | BareLoop, steps: int, global_batch: int) -> int:
    loop.round(steps)
    return steps * global_batch


def _mean(loop: TrainerLoop | BareLoop, ranks: Ranks) -> float:
    """Of the first step's loss, over the ranks."""
    loss = torch.tensor(loop.round(1), dtype=torch.float64)
    if ranks.world_size > 1:
        dist.all_reduce(loss)
    return loss.item() / ranks.world_size


def same_start(one: float, other: float) -> str | None:
    if not abs(one - other) <= SAME_LOSS:  # not: NaN
        return f"they start at losses of {one:.5f} and {other:.5f}"
    return None


# ---- resume ----

PLACES = {"resume at 1 %": 0.01, "resume at 99 %": 0.99}


def resume_contestants(job: Job, ranks: Ranks) -> list[Contestant]:
    """From a checkpoint within an epoch to the first step after it, what Python imports left out."""
    contestants = []
    for name, share in PLACES.items():
        config = job.config(name.replace(" ", "-").replace("%", "percent"), ranks.world_size)
        run = built(config, ranks)
        run.step = run.loader.step = max(1, int(share * run.loader.steps_per_epoch))
        settings = f"step {run.step} of {run.loader.steps_per_epoch} of the epoch, {len(run.loader.reader):,} samples"
        _save(run, ranks)
        run.close()
        resumed: list[Training] = []
        contestants.append(
            Contestant(
                name=name,
                round=partial(_resume, config, ranks, resumed),
                settings=f"{settings}; data, model, engine, checkpoint, first step; ddp, {ranks.world_size} ranks",
                between=partial(_end, resumed, ranks),
            )
        )
    return contestants


def _resume(config: TrainConfig, ranks: Ranks, resumed: list[Training]) -> int:
    run = built(config, ranks)
    resumed.append(run)
    first = run.step
    TrainerLoop(run).round(1)
    assert first > 0 and run.step == first + 1, f"resumed at step {first}"
    return 1


def _end(resumed: list[Training], ranks: Ranks) -> None:
    resumed.pop().close()
    meet(ranks)


# ---- checkpoint ----


def checkpoint_contestants(job: Job, ranks: Ranks) -> list[Contestant]:
    """How long the training stands still for a checkpoint, beside a plain copy of the same state."""
    run = built(job.config(f"checkpoint-{job.model}", ranks.world_size), ranks)
    TrainerLoop(run).round(1)  # the optimiser's state is there then
    live = [tensor for piece in run.engine.pieces() for tensor in piece.tensors.values()]
    held = [torch.empty_like(tensor, device="cpu") for tensor in live]
    nbytes = sum(tensor.nbytes for tensor in live)
    settings = f"{nbytes / 1e6:.1f} MB of rank 0's share of weights and optimiser state, {ranks.world_size} ranks"
    return [
        Contestant("bare copy", partial(_copy, held, live, nbytes), settings, between=partial(meet, ranks)),
        Contestant("save", partial(_begin_save, run, nbytes), settings, between=partial(_saved, run, ranks)),
    ]


def _copy(held: list[torch.Tensor], live: list[torch.Tensor], nbytes: int) -> int:
    """Into memory that is there."""
    for target, tensor in zip(held, live, strict=True):
        target.copy_(tensor)
    return nbytes


def _begin_save(run: Training, nbytes: int) -> int:
    """What blocks the step: the writing goes on in the background."""
    run.step += 1
    save(run)
    return nbytes


def _saved(run: Training, ranks: Ranks) -> None:
    if lost := finish_saving(run):
        raise OSError(lost)
    meet(ranks)


def _save(run: Training, ranks: Ranks) -> None:
    save(run)
    _saved(run, ranks)


# ---- all parts ----

PARTS: dict[str, tuple[Callable[[Job, Ranks], list[Contestant]], str]] = {
    "step": (step_contestants, "images"),
    "resume": (resume_contestants, "starts"),
    "checkpoint": (checkpoint_contestants, "bytes"),
}


def measure(job: Job, ranks: Ranks) -> list[str]:
    """A line for each contestant of each part. A save takes milliseconds: it has more rounds, and larger models too."""
    lines = []
    for part in job.parts:
        make, unit = PARTS[part]
        saves = part == "checkpoint"
        for model in job.checkpoint_models if saves else (job.model,):
            contestants = make(replace(job, model=model), ranks)
            meet(ranks)
            timings = compare(contestants, (3 if saves else 1) * job.rounds, same_start)
            name = f"{part}, {model}" if saves else part
            lines += [row.to_json({}) for row in summarise("train", name, unit, contestants, timings)]
    return lines


def main(arguments: list[str]) -> int:
    job = Job.read(Path(arguments[0]))
    quiet_libraries()
    ranks = ranks_from_environment()
    join_ranks(ranks)
    try:
        lines = measure(job, ranks)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if ranks.rank == 0:
        job.rows.write_text("".join(f"{line}\n" for line in lines))
    meet(ranks)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
