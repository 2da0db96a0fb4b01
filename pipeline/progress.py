"""Rich progress on a terminal; elsewhere a line now and then, so that a log file stays readable."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 60.0


class TrainProgress:
    """Steps done, loss, validation accuracy and time left. Silent on all ranks but the first."""

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        self._console = Console()
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps {task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not enabled or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=done, status="")
        self._enabled = enabled
        self._loss = self._top1 = ""
        self._epoch = 0
        self._total, self._first, self._done = total, done, done
        self._started = self._said = time.monotonic()

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self) -> None:
        self._bar.advance(self._task)
        self._done += 1
        if self._enabled and not self._console.is_terminal and time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            left = (self._total - self._done) * (self._said - self._started) / (self._done - self._first)
            print(f"step {self._done} of {self._total}: {self._loss}, {_hours(left)} left", flush=True)

    def show(self, epoch: int, loss: float) -> None:
        self._epoch, self._loss = epoch, f"loss {loss:.4f}"
        self._bar.update(self._task, status=f"epoch {epoch} {self._loss} {self._top1}")

    def show_accuracy(self, top1: float) -> None:
        self._top1 = f"top-1 {100 * top1:.2f} %"
        self._bar.update(self._task, status=f"epoch {self._epoch} {self._loss} {self._top1}")
        if self._enabled and not self._console.is_terminal:
            print(f"epoch {self._epoch}: {self._loss}, {self._top1} per image", flush=True)


def _hours(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.0f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )
