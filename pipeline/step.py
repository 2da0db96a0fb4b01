"""One step of training: its micro-batches forward and backward, then the optimiser, or the step's omission by all."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.build import Training
from pipeline.data.batch import Batch
from pipeline.data.mixing import erase, mix, targets_of
from pipeline.flops import mfu
from pipeline.loss import loss_of
from pipeline.noise.reference import Purpose, random_words, stream_of

_GRID = 16  # pictures shown at step 0


def steps_of(batches: Iterable[Batch], accumulation: int) -> Iterator[Iterator[Batch]]:
    """The micro-batches of one step after another, each read only when it is asked for."""
    iterator = iter(batches)
    for first in iterator:
        yield itertools.chain((first,), itertools.islice(iterator, accumulation - 1))


def train_step(run: Training, micro_batches: Iterable[Batch], epoch: int, save_due: bool = False) -> None:
    """Takes one step, or counts that it was skipped: by all ranks, where loss or gradients of any are not finite.

    Leaves the ranks' agreement on what follows under way. Errors: ValueError after too many skipped in a row.
    """
    run.agreement.propose(run.asked_to_stop(), save_due)
    run.moving.remember()
    run.schedule.step_update(run.step)
    for number, batch in enumerate(micro_batches, start=1):
        run.losses.append(micro_step(run, batch, epoch, last=number == run.layout.accumulation))
        run.throughput.count(len(batch.labels) * run.layout.world_size)
        if run.ledger is not None:
            run.ledger.note(batch.sample_ids.tolist())
    taken = run.engine.step()
    if not taken.applied:
        run.moving.restore()
    run.step += 1
    run.grad_norm = taken.grad_norm
    if run.ledger is not None:
        run.ledger.end_step(run.step, epoch)
    if taken.applied:
        run.skipped_in_a_row = 0
        return
    run.skipped += 1
    run.skipped_in_a_row += 1
    if run.skipped_in_a_row == run.config.stop_after_bad_steps:
        raise ValueError(
            f"loss or gradients were not finite in {run.skipped_in_a_row} steps in a row, the last is {run.step}: "
            f"lower optim.lr, or go on from an earlier checkpoint by --resume {run.config.run}/checkpoints/step-N"
        )


def micro_step(run: Training, batch: Batch, epoch: int, last: bool) -> Tensor:
    """Forward and backward. Returns the detached loss."""
    ids = batch.sample_ids.to(run.engine.device, non_blocking=True)
    run.injector.set_batch(ids, epoch, run.step, run.step / run.total_steps)
    run.drop_path.set_batch(ids, epoch)
    x, targets = inputs_and_targets(run, batch, epoch)
    # Dropout draws from torch's generator: the same for any number of ranks at one micro-batch.
    torch.manual_seed(_dropout_seed(batch.sample_ids[:1], run.config.seed, epoch))
    show_inputs(run, x)
    loss = loss_of(run.engine.module(x), targets, run.config.loss)
    run.engine.backward(loss, last)
    return loss.detach()


def inputs_and_targets(run: Training, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) as the network gets it and (B, classes). Erased and mixed without noise, which then comes in."""
    config, augment, ids, classes = run.config, run.config.augment, batch.sample_ids, len(run.classes)
    labels = batch.labels.to(run.engine.device, non_blocking=True)
    if not (augment.erasing or augment.mixes_samples):
        return run.preprocess(batch.images), targets_of(labels, classes, config.label_smoothing)
    x = erase(run.preprocess.normalise(batch.images), ids, config.seed, epoch, augment)
    x, targets = mix(x, labels, ids, config.seed, epoch, augment, classes, config.label_smoothing)
    return run.preprocess.noise(x), targets


def _dropout_seed(first_id: Tensor, seed: int, epoch: int) -> int:
    """63 bits keyed by the micro-batch's first sample, int64 (1,) on the CPU, so that no GPU is waited for."""
    high, low = random_words(2, first_id, seed, torch.tensor(epoch), stream_of("model", Purpose.MASK))[0].tolist()
    return (high & 0x7FFFFFFF) << 32 | low


def show_inputs(run: Training, x: Tensor) -> None:
    """Writes the first pictures as the network really gets them, after augmentation and noise at the image."""
    if run.step or run.log is None or run.shown:
        return
    run.shown = True
    run.log.pictures("input/step_0", 0, run.preprocess.undo(x[:_GRID].float()).cpu())


def report_step(run: Training) -> float:
    """Writes the mean over the steps since the last report and over all ranks. Returns the loss."""
    losses = torch.stack(run.losses)
    run.losses = []
    replaced = run.loader.take_replaced()
    for bad in replaced:
        print(f"replaced: by sample {bad.by}: {bad.reason}", file=sys.stderr)
    finite = losses.isfinite()  # the others were skipped, and are counted as such
    sums = torch.stack((losses[finite].sum(), finite.sum(), losses.new_tensor(len(replaced)))).double()
    if run.layout.world_size > 1:
        dist.all_reduce(sums)
    total, count, replaced_by_all = sums.tolist()
    rate, waiting = run.throughput.take()
    loss = total / count if count else float("nan")
    if run.log is not None:
        values = {
            "train/loss": loss,
            "train/grad_norm": run.grad_norm,
            "train/lr": max(group["lr"] for group in run.engine.optimizer.param_groups),
            "train/epoch": run.step / run.loader.steps_per_epoch,
            "train/images_per_second": rate,
            "train/data_wait_share": waiting,
            "train/replaced_samples": round(replaced_by_all),
            "train/skipped_steps": run.skipped,
        }
        used = mfu(rate, run.flops_per_image, run.peak_flops, run.layout.world_size)
        run.log.scalars(run.step, values if used is None else values | {"train/mfu": used})
    return loss
