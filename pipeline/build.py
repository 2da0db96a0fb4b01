"""Everything that a run consists of, built and resumed before the loop begins."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from pipeline import checkpoint as ckpt
from pipeline.accuracy import Accuracy
from pipeline.agreement import Agreement
from pipeline.config import TrainConfig
from pipeline.data.batch import Reader
from pipeline.data.loader import TrainLoader, open_split
from pipeline.data.order import Layout, layout_of
from pipeline.data.reader import PictureReader
from pipeline.engine import Engine, check_engine, create_engine
from pipeline.engine.strategy import has_batch_norm
from pipeline.evaluator import Evaluator
from pipeline.flops import peak_flops, training_flops
from pipeline.ledger import SampleLedger, cut_ledger
from pipeline.metrics import RunLog, Throughput
from pipeline.models import Preprocess, create_model
from pipeline.moving_averages import MovingAverages
from pipeline.noise.drop_path import DropPathKeys
from pipeline.noise.inject import NoiseInjector
from pipeline.optim import create_optimizer, create_schedule
from pipeline.parallel import Ranks, barrier, check_devices, require_same_on_all_ranks
from pipeline.state import came_from, check_record, choose_generation
from pipeline.watchdog import Watchdog

_LAST_SECONDS = 3.0


@dataclass
class Training:
    """What the loop works on."""

    config: TrainConfig
    layout: Layout
    engine: Engine
    model: nn.Module  # timm's own, inside the engine's
    schedule: Any
    injector: NoiseInjector
    drop_path: DropPathKeys
    preprocess: Preprocess
    loader: TrainLoader
    evaluators: dict[str, Evaluator]  # tag -> of the weights that run, and of their average
    classes: tuple[str, ...]
    label_map: bytes | None
    writer: ckpt.CheckpointWriter
    agreement: Agreement
    watchdog: Watchdog
    log: RunLog | None
    ledger: SampleLedger | None
    moving: MovingAverages
    flops_per_image: int  # of a forward and a backward pass
    peak_flops: float | None  # of one device, where its data sheet is known
    step: int = 0
    first_step: int = 0  # of this start
    saved_step: int = 0
    saved_evaluated: bool = True
    save_due: bool = False  # since a step at which it had to wait for an evaluation
    stop_signal: int = 0  # that an evaluation was given up for
    evaluated: bool = True  # whether the epoch that ends at this step has been
    accuracy: Accuracy | None = None
    skipped: int = 0  # steps that were not applied
    skipped_in_a_row: int = 0
    grad_norm: float = 0.0
    losses: list[Tensor] = field(default_factory=list)  # since the last report
    shown: bool = False  # whether the first pictures were written
    throughput: Throughput = field(default_factory=Throughput)
    asked_to_stop: Callable[[], int] = lambda: 0  # gives the signal that this rank was sent
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.layout.rank, self.layout.world_size, launched=True)

    def still_wanted(self) -> bool:
        """Collective, between two batches of an evaluation: whether to go on with it."""
        self.watchdog.beat()
        self.stop_signal = self.agreement.now(self.asked_to_stop()).stop
        return not self.stop_signal

    def note_saved(self) -> None:
        self.saved_step, self.saved_at = self.step, time.monotonic()
        self.saved_evaluated, self.save_due = self.evaluated, False

    def seconds_since_save(self) -> float:
        return time.monotonic() - self.saved_at

    def close(self) -> None:
        """Ends what runs beside the loop. A checkpoint under way gets a moment more."""
        self.watchdog.rest()
        self.writer.wait(_LAST_SECONDS)
        self.loader.close()
        for file in (self.log, self.ledger):
            if file is not None:
                file.close()

    @property
    def total_steps(self) -> int:
        """Of the schedule, whether or not this start takes them all."""
        return total_steps(self.config, self.loader)

    @property
    def last_step(self) -> int:
        return min(self.total_steps, self.config.stop_after_steps or self.total_steps)


def total_steps(config: TrainConfig, loader: TrainLoader) -> int:
    """Errors: ValueError where `samples` is less than one step."""
    if config.samples is None:
        return config.epochs * loader.steps_per_epoch
    if config.samples < config.global_batch:
        raise ValueError(f"samples is {config.samples}, less than one step of global_batch {config.global_batch}")
    return config.samples // config.global_batch


def build(config: TrainConfig, ranks: Ranks) -> Training:
    """Opens the data, builds the model, wraps it for this many ranks, and resumes where there is what to go on from."""
    readers = open_data(config)
    data = {"data.train": readers[0].samples_sha256, "data.val": readers[1].samples_sha256}
    require_same_on_all_ranks(data, ranks)
    layout = run_layout(config, ranks)
    loader = TrainLoader(readers[0], layout, config.seed, config.data.workers, config.data.window)
    generation = choose_generation(config, ranks)
    if generation is not None:
        check_record(generation, config, loader)
    model, injector = build_model(config, readers[0], generation is None, ranks.world_size)
    drop_path = DropPathKeys(model, config.seed)
    optim = config.optim
    optimizer = create_optimizer(model, optim)
    schedule = create_schedule(optimizer, optim, total_steps(config, loader), loader.steps_per_epoch, layout)
    engine = create_engine(model, optimizer, config.parallel, layout, optim.clip_grad_norm, optim.ema_decay)
    if generation is not None:
        resume(generation, engine)
    record = {} if generation is None else generation.record
    step = record.get("step", 0)
    main = ranks.rank == 0
    if main:
        print(*notes(config, engine, layout, has_batch_norm(model), record), sep="", end="", flush=True)
    writer = ckpt.CheckpointWriter(config.run, config.checkpoint, ranks.rank, ranks.world_size)
    writer.prepare(engine.pieces())  # else the first save would take five times as long
    if main:
        cut_ledger(config.run, step)
    barrier(ranks)  # the files are cut before anybody adds to them
    return Training(
        config=config,
        layout=layout,
        engine=engine,
        model=model,
        schedule=schedule,
        injector=injector,
        drop_path=drop_path,
        preprocess=Preprocess(model, engine.device, injector),
        loader=loader,
        evaluators=evaluators(config, engine, model, injector, readers),
        classes=readers[0].classes,
        label_map=None if config.data.label_map is None else config.data.label_map.read_bytes(),
        writer=writer,
        agreement=Agreement(ranks.world_size, config.parallel.timeout_seconds),
        watchdog=Watchdog(config.parallel.timeout_seconds),
        log=RunLog(config.run, step) if main else None,
        ledger=SampleLedger(config.run, ranks.rank, ranks.world_size) if config.ledger else None,
        moving=MovingAverages(model),
        flops_per_image=training_flops(config.model, len(readers[0].classes), config.data.image_size),
        peak_flops=peak_flops(torch.cuda.get_device_name(), config.parallel.precision)
        if torch.cuda.is_available()
        else None,
        step=step,
        first_step=step,
        saved_step=step,
        saved_evaluated=record.get("evaluated", True),
        evaluated=record.get("evaluated", True),
        skipped=record.get("skipped_steps", 0),
    )


def notes(config: TrainConfig, engine: Engine, layout: Layout, batch_norm: bool, record: dict[str, Any]) -> list[str]:
    """Where results depend on how the run is spread, by more than the last bits of sums."""
    found = []
    at_once = layout.micro_batch * (layout.world_size if engine.device.type == "cuda" else 1)
    if batch_norm and at_once != layout.global_batch:
        found.append(
            f"note: BatchNorm takes its statistics of {at_once} pictures at a time, {layout.global_batch} make a step: "
            "another number of ranks or another micro_batch gives other results\n"
        )
    before = record.get("strategy", engine.strategy)
    if config.parallel.precision != "fp32" and (before == "ddp") != (engine.strategy == "ddp"):
        found.append(
            f"note: {config.parallel.precision} under {engine.strategy} rounds in other places than under {before}, "
            "with which this run began\n"
        )
    return found


def resume(generation: ckpt.Generation, engine: Engine) -> None:
    """Fills this rank's part of the state from the parts of all ranks that wrote it."""
    generation.fill(engine.pieces())
    own = engine.buffers()
    for name, saved in generation.buffers().items():
        own[name].copy_(saved)
    engine.load_scalars(generation.record["scalars"])
    engine.loaded()


def evaluators(
    config: TrainConfig, engine: Engine, model: nn.Module, injector: NoiseInjector, readers: tuple[PictureReader, ...]
) -> dict[str, Evaluator]:
    """One for the running weights, and one for their average where there is one.

    A second model holds what is not whole in the first: the average, and weights that lie in partitions, whose forward
    pass is a collective that ranks with unequal shares of the pictures would not all reach.
    """

    def replica() -> Evaluator:
        twin, its_injector = build_model(config, readers[0], starting=False)
        return evaluator_of(twin.to(engine.device), its_injector)

    def evaluator_of(of: nn.Module, its_injector: NoiseInjector) -> Evaluator:
        assert config.micro_batch != "auto"
        return Evaluator(
            of, its_injector, readers[1], config.micro_batch, config.data.workers, config.parallel.autocast_dtype
        )

    found = {"val": replica() if engine.strategy == "zero3" else evaluator_of(model, injector)}
    if config.optim.ema_decay is not None:
        found["val_ema"] = replica()
    return found


def run_layout(config: TrainConfig, ranks: Ranks) -> Layout:
    """How the global batch is spread: groups of the noise, and mixing's pairs, never lie across two micro-batches."""
    assert config.micro_batch != "auto", "it is found before anything is laid out"
    return layout_of(
        config.global_batch, config.micro_batch, ranks.rank, ranks.world_size, smallest_micro_batch(config)
    )


def smallest_micro_batch(config: TrainConfig) -> int:
    """What every micro-batch is a multiple of."""
    noise = config.noise
    grouped = noise.mixes_samples and noise.active(training=True) and noise.group_size is not None
    return math.lcm(noise.group_size or 1 if grouped else 1, 2 if config.augment.mixes_samples else 1)


def open_data(config: TrainConfig) -> tuple[PictureReader, PictureReader]:
    """Training and validation split. Errors: ValueError where their classes differ."""
    train_split = open_split(config.data.train, config.data, config.augment, config.seed)
    # Validation takes no augmentation: without what Python draws threads read it.
    val_split = open_split(config.data.val, config.data, config.augment.for_evaluation(), config.seed)
    if train_split.classes != val_split.classes:
        differing = sorted(set(train_split.classes) ^ set(val_split.classes))[:5]
        raise ValueError(
            f"{config.data.train} and {config.data.val} have different classes (such as {differing}): "
            "shard both splits from folders with the same class names"
        )
    return train_split, val_split


def build_model(
    config: TrainConfig, reader: Reader, starting: bool, world_size: int = 1
) -> tuple[nn.Module, NoiseInjector]:
    """The model with its noise, the same on every rank. starting: with its starting weights, not to be loaded over."""
    torch.manual_seed(config.seed)
    options = config.model if starting else config.model.without_start()
    model = create_model(options, len(reader.classes), config.data.image_size)
    if torch.cuda.is_available() and world_size > 1:  # before any hook is attached, which a new module has not
        model = convert_sync_batchnorm(model)
    return model, NoiseInjector(model, config.noise, config.data.image_size, config.seed)


def check(config: TrainConfig, world_size: int) -> None:
    """Everything that can be wrong with a configuration, found in one process before any rank starts.

    Errors: ValueError, FileNotFoundError.
    """
    check_devices(world_size)
    if config.run.exists() and not config.run.is_dir():
        raise ValueError(f"--run {config.run} is a file: name a folder")
    newest = ckpt.newest_record(config.run, config.checkpoint)
    found = None if newest is None else newest.folder
    if found is not None and config.resume == "never":
        raise ValueError(
            f"{config.run} holds the run of {found.name}: leave out --resume never to go on, or name another"
        )
    if config.resume not in ("auto", "never") and not came_from(newest, config.resume):
        found = Path(config.resume)
        ckpt.verify_generation(found, lambda name: name == ckpt.CONFIG_NAME)
    reader, val_reader = open_data(config)
    for split in (reader, val_reader):
        split.source.check_sizes()
    if config.micro_batch == "auto":
        config = replace(config, micro_batch=smallest_micro_batch(config))
    layout = run_layout(config, Ranks(0, world_size, launched=False))
    loader = TrainLoader(reader, layout, config.seed, 0, config.data.window)
    if found is not None:
        check_record(ckpt.Generation(found), config, loader)
    model, _ = build_model(config, reader, starting=found is None)
    optimizer = create_optimizer(model, config.optim)
    check_engine(model, optimizer, config.parallel)
    create_schedule(optimizer, config.optim, total_steps(config, loader), loader.steps_per_epoch, layout)
