"""Progress of a long command: a bar on a terminal, a plain line each half minute in a job's log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from data_prep.workers import Progress as OnDone

SECONDS_BETWEEN_LINES = 30.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0.0
        bytes_each = task.fields["bytes"] / task.completed if task.completed else 0.0
        return Text(f"{speed:.0f} {task.fields['unit']}/s {speed * bytes_each / 1e6:.0f} MB/s")


@contextlib.contextmanager
def progress(what: str, unit: str = "images") -> Iterator[OnDone]:
    """Yields on_done(samples, bytes, total)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, unit).on_done
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None, unit=unit, bytes=0)

        def on_done(samples: int, size: int, total: int) -> None:
            held = bar.tasks[0].fields["bytes"]
            bar.update(task, advance=samples, total=total or None, bytes=held + size)

        yield on_done


class _Lines:
    """Lines such as `shard train: 12,000 of 1,281,167 images, 820 images/s, 90 MB/s, 26 min left`."""

    def __init__(self, what: str, unit: str) -> None:
        self.what, self.unit = what, unit
        self.samples = self.bytes = 0
        self.start = self.last = time.monotonic()

    def on_done(self, samples: int, size: int, total: int) -> None:
        self.samples += samples
        self.bytes += size
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        seconds = now - self.start
        of, left = "", ""
        if total:
            of = f" of {total:,}"
            left = f", {_duration(seconds * (total - self.samples) / max(1, self.samples))} left"
        print(
            f"{self.what}: {self.samples:,}{of} {self.unit}, {self.samples / seconds:,.0f} {self.unit}/s, "
            f"{self.bytes / seconds / 1e6:,.0f} MB/s{left}",
            file=sys.stderr,
            flush=True,
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
