"""Training: build -> resume -> loop."""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from pipeline import checkpoint as ckpt
from pipeline.config import TrainConfig
from pipeline.data.augment import mixup
from pipeline.data.batch import Batch, Reader
from pipeline.data.loader import TrainLoader, open_split
from pipeline.data.order import Layout, layout_of
from pipeline.data.reader import PictureReader
from pipeline.evaluate import Accuracy, Evaluator
from pipeline.metrics import RunLog, Throughput
from pipeline.models import Preprocess, create_model
from pipeline.noise.inject import NoiseInjector
from pipeline.noise.reference import Purpose, random_words, stream_of
from pipeline.optim import create_optimizer, create_schedule
from pipeline.parallel import (
    Ranks,
    assert_engine,
    build_accelerator,
    check_devices,
    require_same_on_all_ranks,
    snapshot_environment,
)
from pipeline.progress import TrainProgress
from pipeline.sections import to_json
from pipeline.state import checked_progress, save_run

_GRID = 16  # pictures shown at step 0


@dataclass
class Training:
    """Everything a run consists of, built and resumed, ready for the loop."""

    config: TrainConfig
    layout: Layout
    accelerator: Any
    engine: Any  # the prepared model: DeepSpeedEngine or DistributedDataParallel
    model: nn.Module  # timm's own, inside it
    optimizer: Any
    schedule: Any
    injector: NoiseInjector
    preprocess: Preprocess
    loader: TrainLoader
    evaluator: Evaluator
    classes: tuple[str, ...]
    step: int
    log: RunLog | None
    throughput: Throughput
    shown: bool = False  # whether the first pictures were written

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.layout.rank, self.layout.world_size, launched=True)

    @property
    def last_step(self) -> int:
        total = self.config.epochs * self.loader.steps_per_epoch
        return min(total, self.config.stop_after_steps or total)


def train(run: Training) -> Accuracy:
    """The loop. Returns the last validation's per-image accuracy."""
    config, accuracy = run.config, None
    with TrainProgress(run.last_step, run.step, run.layout.rank == 0) as progress:
        while run.step < run.last_step:
            run.model.train()
            epoch = run.loader.epoch
            losses: list[Tensor] = []
            for batch in run.throughput.timed(run.loader):
                losses.append(micro_step(run, batch, epoch))
                run.throughput.count(len(batch.labels) * run.layout.world_size)
                if not run.accelerator.sync_gradients:
                    continue
                run.step += 1
                if run.step % config.log_every == 0 or run.step == run.last_step:
                    loss = log_step(run, losses)
                    progress.show(epoch, loss)
                    losses = []
                progress.advance()
                if run.step == run.last_step:
                    break
            accuracy = validate(run)
            progress.show_accuracy(accuracy.top1)
            if (epoch + 1) % config.checkpoint.every_epochs == 0 or run.step == run.last_step:
                save_run(config, run.accelerator, run.model, run.loader, run.classes, run.step)
    return accuracy or validate(run)


def micro_step(run: Training, batch: Batch, epoch: int) -> Tensor:
    """Forward, backward, and at the end of an accumulation the optimiser's step. Returns the detached loss."""
    config = run.config
    run.injector.set_batch(batch.sample_ids.to(run.accelerator.device), epoch, run.step, run.step / run.last_step)
    x, targets = inputs_and_targets(run, batch, epoch)
    run.schedule.step_update(run.step)
    # Drop path and dropout draw from torch's generator: the same for any number of ranks at one micro-batch.
    torch.manual_seed(_dropout_seed(batch.sample_ids[:1], config.seed, epoch))
    with run.accelerator.accumulate(run.engine), _shown_inputs(run):
        logits = run.engine(x)
        loss = nn.functional.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        run.accelerator.backward(loss)
        if run.accelerator.sync_gradients and config.parallel.engine == "ddp" and config.optim.clip_grad_norm:
            run.accelerator.clip_grad_norm_(run.engine.parameters(), config.optim.clip_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return loss.detach()


def inputs_and_targets(run: Training, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) as the network gets it and (B, classes). Mixup is of pictures without noise, which then come in."""
    config = run.config
    labels = batch.labels.to(run.accelerator.device)
    targets = nn.functional.one_hot(labels, len(run.classes)).float()
    if not config.augment.mixup_alpha:
        return run.preprocess(batch.images), targets
    x = run.preprocess.normalise(batch.images)
    x, targets = mixup(x, targets, batch.sample_ids, config.seed, epoch, config.augment.mixup_alpha)
    return run.preprocess.noise(x), targets


def _dropout_seed(first_id: Tensor, seed: int, epoch: int) -> int:
    """63 bits keyed by the micro-batch's first sample, int64 (1,) on the CPU, so that no GPU is waited for."""
    high, low = random_words(2, first_id, seed, torch.tensor(epoch), stream_of("model", Purpose.MASK))[0].tolist()
    return (high & 0x7FFFFFFF) << 32 | low


@contextlib.contextmanager
def _shown_inputs(run: Training):
    """Writes the first pictures as the network really gets them, after augmentation and noise at the image."""
    if run.step or run.log is None or run.shown:
        yield
        return
    run.shown = True
    seen: list[Tensor] = []
    handle = run.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        yield
    finally:
        handle.remove()
    run.log.pictures("input/step_0", 0, run.preprocess.undo(seen[0][:_GRID].float()).cpu())


def log_step(run: Training, losses: list[Tensor]) -> float:
    """Writes the window's mean loss over all ranks; stops a run whose loss is no longer a number."""
    mean = torch.stack(losses).mean()
    replaced = mean.new_tensor(_report_replaced(run))
    loss, replaced_by_a_rank = run.accelerator.reduce(torch.stack((mean, replaced)), reduction="mean").tolist()
    rate, waiting = run.throughput.take()
    if run.log is not None:
        values = {
            "train/loss": loss,
            "train/lr": run.schedule.optimizer.param_groups[0]["lr"],
            "train/epoch": run.step / run.loader.steps_per_epoch,
            "train/images_per_second": rate,
            "train/data_wait_share": waiting,
            "train/replaced_samples": round(replaced_by_a_rank * run.layout.world_size),
        }
        run.log.scalars(run.step, values)
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {run.step}: lower optim.lr, or resume from before it")
    return loss


def _report_replaced(run: Training) -> float:
    """Says which samples of this rank were replaced since the last time; returns how many."""
    replaced = run.loader.take_replaced()
    for bad in replaced:
        print(f"replaced: by sample {bad.by}: {bad.reason}", file=sys.stderr)
    return float(len(replaced))


def validate(run: Training) -> Accuracy:
    """Per-image accuracy over the validation split, noise off."""
    if run.layout.world_size > 1:
        distribute_bn(run.model, run.layout.world_size, reduce=True)
    accuracy = run.evaluator.per_image(run.ranks)
    if run.log is not None:
        run.log.scalars(run.step, {"val/top1": accuracy.top1, "val/top5": accuracy.top5})
    run.throughput.take()  # validation is no part of the training rate
    return accuracy


def build(config: TrainConfig, ranks: Ranks) -> Training:
    """Opens the data, builds the model, wraps both for this many ranks, and resumes where asked."""
    layout = run_layout(config, ranks)
    accelerator = build_accelerator(config.parallel, layout, config.optim.clip_grad_norm)
    readers = open_data(config)
    data = {"data.train": readers[0].samples_sha256, "data.val": readers[1].samples_sha256}
    require_same_on_all_ranks(data, ranks)
    model, injector = build_model(config, readers[0])
    model.to(accelerator.device)
    optimizer = create_optimizer(model, config.optim)
    loader = TrainLoader(readers[0], layout, config.seed, config.data.workers, config.data.window)
    schedule = create_schedule(optimizer, config.optim, config.epochs, loader.steps_per_epoch)
    engine, prepared = accelerator.prepare(model, optimizer)
    assert_engine(engine, config.parallel, ranks.world_size)
    step = resume(config, accelerator, loader) if config.resume else 0
    main = ranks.rank == 0
    return Training(
        config=config,
        layout=layout,
        accelerator=accelerator,
        engine=engine,
        model=model,
        optimizer=prepared,
        schedule=schedule,
        injector=injector,
        preprocess=Preprocess(model, accelerator.device, injector),
        loader=loader,
        evaluator=Evaluator(model, injector, readers[1], config.micro_batch, config.data.workers),
        classes=readers[0].classes,
        step=step,
        log=RunLog(config.run, step) if main else None,
        throughput=Throughput(),
    )


def run_layout(config: TrainConfig, ranks: Ranks) -> Layout:
    """How the global batch is spread: groups of the noise, and mixup's pairs, never lie across two micro-batches."""
    noise = config.noise
    grouped = noise.mixes_samples and noise.active(training=True) and noise.group_size is not None
    multiple = math.lcm(noise.group_size or 1 if grouped else 1, 2 if config.augment.mixup_alpha else 1)
    return layout_of(config.global_batch, config.micro_batch, ranks.rank, ranks.world_size, multiple)


def open_data(config: TrainConfig) -> tuple[PictureReader, PictureReader]:
    """Training and validation split. Errors: ValueError where their classes differ."""
    train_split = open_split(config.data.train, config.data, config.augment, config.seed)
    # Validation takes no augmentation: without RandAugment threads read it.
    val_split = open_split(config.data.val, config.data, replace(config.augment, randaugment=None), config.seed)
    if train_split.classes != val_split.classes:
        differing = sorted(set(train_split.classes) ^ set(val_split.classes))[:5]
        raise ValueError(
            f"{config.data.train} and {config.data.val} have different classes (such as {differing}): "
            "shard both splits from folders with the same class names"
        )
    return train_split, val_split


def build_model(config: TrainConfig, reader: Reader) -> tuple[nn.Module, NoiseInjector]:
    """The model with its noise, the same on every rank."""
    torch.manual_seed(config.seed)
    model = create_model(config.model, len(reader.classes), config.data.image_size)
    return model, NoiseInjector(model, config.noise, config.data.image_size, config.seed)


def resume(config: TrainConfig, accelerator: Any, loader: TrainLoader) -> int:
    """Loads the latest generation into engine and loader; returns its step, or 0 where there is none."""
    generation = ckpt.latest_generation(config.run)
    if generation is None:
        return 0
    progress = checked_progress(generation, config, loader)
    accelerator.load_state(str(generation / ckpt.ENGINE_FOLDER))
    return progress["step"]


def check(config: TrainConfig, world_size: int) -> None:
    """Everything that can be wrong with a configuration, found in one process before any rank starts.

    Errors: ValueError, FileNotFoundError.
    """
    check_devices(world_size)
    layout = run_layout(config, Ranks(0, world_size, launched=False))
    if config.run.exists() and not config.run.is_dir():
        raise ValueError(f"--run {config.run} is a file: name a folder")
    finished = ckpt.latest_generation(config.run)
    if finished is not None and not config.resume:
        raise ValueError(f"{config.run} holds the run of {finished.name}: pass --resume to go on, or another --run")
    reader, val_reader = open_data(config)
    for split in (reader, val_reader):
        split.source.check_sizes()
    loader = TrainLoader(reader, layout, config.seed, 0, config.data.window)
    if finished is not None:
        checked_progress(finished, config, loader)
        ckpt.verify_generation(finished)  # once, here, not by every rank of a machine
    model, _ = build_model(config, reader)
    create_schedule(create_optimizer(model, config.optim), config.optim, config.epochs, loader.steps_per_epoch)


def run_training(config: TrainConfig, ranks: Ranks) -> None:
    """Trains in this rank and writes `results.json`, the mark of a finished run."""
    if ranks.rank == 0:
        config.run.mkdir(parents=True, exist_ok=True)
    run = build(config, ranks)
    if ranks.rank == 0:
        ckpt.write_json(config.run / ckpt.CONFIG_NAME, to_json(replace(config, resume=False)))
    first_step = run.step
    accuracy = train(run)
    if run.log is not None:
        run.log.close()
        state = run.accelerator.state
        results = {
            "per_image": accuracy.to_json(),
            "epochs": config.epochs,
            "steps": run.step,
            "first_step": first_step,
            "world_size": run.accelerator.num_processes,
            "distributed_type": str(state.distributed_type).removeprefix("DistributedType."),
            "engine": type(run.engine).__name__,
            "zero_stage": run.engine.zero_optimization_stage() if config.parallel.engine == "deepspeed" else None,
            "evaluated_in": config.parallel.precision,
            "noise": to_json(config.noise),
            "noise_description": config.noise.describe(),
            "num_train_images": len(run.loader.reader),
            "num_eval_images": accuracy.num_images,
            "environment": snapshot_environment(),
        }
        ckpt.write_json(config.run / "results.json", results)
    run.accelerator.wait_for_everyone()
