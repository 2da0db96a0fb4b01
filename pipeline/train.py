"""Training: build -> resume -> loop."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
from collections.abc import Callable
from dataclasses import replace

from timm.utils import distribute_bn

from pipeline import checkpoint as ckpt
from pipeline.accuracy import Accuracy
from pipeline.build import Training, build, check
from pipeline.config import TrainConfig
from pipeline.evaluator import Interrupted
from pipeline.freezing import hold_frozen_norms
from pipeline.interrupt import StopRequests
from pipeline.micro_batch import with_micro_batch
from pipeline.parallel import Ranks, join_ranks, snapshot_environment
from pipeline.progress import TrainProgress
from pipeline.sections import to_json
from pipeline.state import files_of, record_of
from pipeline.step import report_step, steps_of, train_step
from pipeline.tracing import traced_steps

RESULTS_NAME = "results.json"
_ROUND_SECONDS = 0.5

__all__ = ["Stopped", "Training", "build", "check", "run_training", "train"]


class Stopped(Exception):
    """The run was asked to end, and what it has done is saved, but where `lost` says why it is not."""

    def __init__(self, signal: int, lost: str | None) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal, self.lost = signal, lost


def train(run: Training) -> Accuracy:
    """The loop. Returns the last validation's accuracy. Errors: Stopped, after saving, where any rank was asked."""
    run.watchdog.start()
    rank = run.layout.rank
    tracing = traced_steps(run.config.run, run.config.profile_steps, rank)
    with TrainProgress(run.last_step, run.step, rank == 0) as progress, tracing as traced:
        while run.step < run.last_step or not run.evaluated:
            if run.evaluated:
                train_epoch(run, progress, traced)
            if not run.evaluated:
                progress.show_accuracy(validate(run).top1)
            if checkpoint_due(run):
                save(run)
        accuracy = run.accuracy or validate(run)
    if lost := finish_saving(run):
        raise OSError(f"the run is done, but not saved: {lost}")
    return accuracy


def train_epoch(run: Training, progress: TrainProgress, traced: Callable[[], None]) -> None:
    """The rest of the running epoch, or of the run; ends early where an evaluation is due."""
    run.engine.module.train()
    hold_frozen_norms(run.model)
    epoch = run.loader.epoch
    for micro_batches in steps_of(run.throughput.timed(run.loader), run.layout.accumulation):
        with run.watchdog.patient() if run.step == run.first_step else contextlib.nullcontext():  # it may compile
            train_step(run, micro_batches, epoch, clock_says_save(run))
        run.evaluated = not evaluation_due(run)
        run.watchdog.beat()
        traced()
        if run.step % run.config.log_every == 0 or run.step == run.last_step:
            progress.show(epoch, report_step(run))
        progress.advance()
        tell_failures(run)
        decision = run.agreement.decided()
        if decision.stop:
            stop(run, decision.stop)
        run.save_due |= decision.save or steps_say_save(run)
        if run.step == run.last_step:
            return
        if run.evaluated and run.save_due:  # else it is saved after the evaluation, with its result
            save(run)


def evaluation_due(run: Training) -> bool:
    """After this step: at the end of an epoch, or of the run."""
    epochs, rest = divmod(run.step, run.loader.steps_per_epoch)
    return run.step == run.last_step or (rest == 0 and epochs % run.config.evaluate_every_epochs == 0)


def validate(run: Training) -> Accuracy:
    """Per-image accuracy over the validation split, noise off; of the averaged weights too, which then are the score.

    Errors: Stopped, where it was given up: the resumed run begins with it.
    """
    if run.layout.world_size > 1:
        # Rank 0's averages of BatchNorm are the run's, as they are saved. A mean of all ranks' would change them.
        distribute_bn(run.model, run.layout.world_size, reduce=False)
    found: dict[str, Accuracy] = {}
    for tag, evaluator in run.evaluators.items():
        if evaluator.model is not run.model:
            with run.watchdog.patient():
                evaluator.model.load_state_dict(run.engine.full_weights("ema" if tag == "val_ema" else "weight"))
        try:
            found[tag] = evaluator.per_image(run.ranks, run.still_wanted)
        except Interrupted:
            stop(run, run.stop_signal)
    weights = run.engine.full_weights() if run.config.histograms else {}  # by all ranks
    if run.log is not None:
        run.log.scalars(run.step, {f"{tag}/top{k}": getattr(a, f"top{k}") for tag, a in found.items() for k in (1, 5)})
        run.log.histograms(run.step, weights)
    run.throughput.take()  # validation is no part of the training rate
    run.evaluated, run.accuracy = True, found.get("val_ema", found["val"])
    return run.accuracy


def checkpoint_due(run: Training) -> bool:
    """At the end of an epoch, or of the run; and where the newest one was saved before its evaluation."""
    if run.saved_step == run.step:
        return not run.saved_evaluated
    epochs = run.step // run.loader.steps_per_epoch
    return run.save_due or run.step == run.last_step or epochs % run.config.checkpoint.every_epochs == 0


def steps_say_save(run: Training) -> bool:
    every = run.config.checkpoint.every_steps
    return every is not None and run.step % every == 0


def clock_says_save(run: Training) -> bool:
    """By rank 0's clock, which all ranks then follow."""
    every = run.config.checkpoint.every_minutes
    return every is not None and run.layout.rank == 0 and run.seconds_since_save() >= 60 * every


def save(run: Training) -> None:
    """Hands this rank's state to the writer, which writes it while the training goes on."""
    settle(run)  # else the writer would wait for the last one, and the other ranks for this one
    record = record_of(run.config, run.loader, run.engine, run.step, run.evaluated, run.skipped)
    score = run.accuracy.top1 if run.accuracy is not None and evaluation_due(run) and run.evaluated else None
    files = files_of(run.config, run.label_map, run.classes, run.step)
    with run.watchdog.patient():
        run.writer.save(run.step, run.engine.pieces(), run.engine.buffers(), record, files, score)
    run.note_saved()


def settle(run: Training) -> list[str]:
    """Waits until no rank writes any more. Returns what went wrong meanwhile.

    By short rounds: one long collective would run into the time limit where a large state is still being written, and
    the first rank to leave would be taken for a dead one. A rank that failed ends rank 0's waiting for its part.
    """
    failures: list[str] = []
    while True:
        idle = run.writer.wait(_ROUND_SECONDS)
        failures += tell_failures(run)
        decision = run.agreement.now(int(bool(failures)), save=not idle)
        run.watchdog.beat()
        if not decision.save:
            return failures
        if decision.stop:
            run.writer.abandon()


def finish_saving(run: Training) -> str | None:
    """Returns why the newest state is not on disk, where it is not."""
    failures = settle(run)
    return failures[-1] if failures else None


def tell_failures(run: Training) -> list[str]:
    """What could not be written: the run goes on without it."""
    failures = run.writer.take_failures()
    for line in failures:
        print(f"warning: {line}", file=sys.stderr, flush=True)
    return failures


def stop(run: Training, signal: int) -> None:
    """Saves what is not saved. Errors: Stopped, always."""
    if run.step > run.saved_step:
        save(run)
    raise Stopped(signal, finish_saving(run))


def run_training(config: TrainConfig, ranks: Ranks) -> int:
    """Trains in this rank and writes `results.json`, the mark of a finished run. Returns the exit status."""
    faulthandler.enable()  # where a library aborts the process, its stacks are shown
    requests = StopRequests()
    requests.limit(None if config.walltime_minutes is None else 60 * config.walltime_minutes)
    join_ranks(ranks, config.parallel.timeout_seconds)
    config = with_micro_batch(config, ranks)
    if ranks.rank == 0:
        config.run.mkdir(parents=True, exist_ok=True)
    run = build(config, ranks)
    run.asked_to_stop = requests.pending
    if ranks.rank == 0:
        ckpt.write_json(config.run / ckpt.CONFIG_NAME, to_json(replace(config, resume="auto")))
        if run.step < run.last_step:
            (config.run / RESULTS_NAME).unlink(missing_ok=True)  # of a shorter run that this one goes on from
    try:
        accuracy = train(run)
        if run.log is not None:
            ckpt.write_json(config.run / RESULTS_NAME, results_of(run, accuracy))
        run.agreement.now(0)  # nobody leaves while another still writes
    except Stopped as stopped:
        if ranks.rank == 0 and not stopped.lost:
            print(f"saved at step {run.saved_step} of {run.last_step}: the same command goes on", flush=True)
        return 128 + stopped.signal
    except OSError as error:
        # No fault of the options, so not status 2: a start that follows may find the disk or the store well again.
        if os.environ.get("NOISYNN_TRACEBACK"):
            raise
        print(f"error{f' (rank {ranks.rank})' if ranks.rank else ''}: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        run.close()
    return os.EX_OK


def results_of(run: Training, accuracy: Accuracy) -> dict:
    config, engine = run.config, run.engine
    return {
        "per_image": accuracy.to_json(),
        "epochs": config.epochs,
        "steps": run.step,
        "first_step": run.first_step,
        "skipped_steps": run.skipped,
        "world_size": run.layout.world_size,
        "engine": type(engine.module).__name__,
        "strategy": engine.strategy,
        "evaluated_in": config.parallel.precision,
        "noise": to_json(config.noise),
        "noise_description": config.noise.describe(),
        "num_train_images": len(run.loader.reader),
        "num_eval_images": accuracy.num_images,
        "environment": snapshot_environment(),
    }
