"""Command line: python -m data_prep digits | shard | beton | verify."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from data_prep.beton import BetonOptions, write_beton
from data_prep.digits import DigitsOptions, write_digits
from data_prep.distribute import ShardOptions, shard, summary
from data_prep.verify import VerifyOptions, verify
from data_prep.workers import Progress as OnDone

Command = (
    Annotated[ShardOptions, tyro.conf.subcommand("shard")]
    | Annotated[BetonOptions, tyro.conf.subcommand("beton")]
    | Annotated[VerifyOptions, tyro.conf.subcommand("verify")]
    | Annotated[DigitsOptions, tyro.conf.subcommand("digits")]
)

MAX_SKIPPED_SHOWN = 10


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.0f} {task.fields['unit']}/s")


@contextlib.contextmanager
def _progress(what: str, unit: str = "images") -> Iterator[OnDone]:
    """A bar where standard error is a terminal, nothing elsewhere. Yields on_done(count, total)."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None, unit=unit)

        def on_done(count: int, total: int) -> None:
            progress.update(task, advance=count, total=total)

        yield on_done


def _run(command: ShardOptions | BetonOptions | VerifyOptions | DigitsOptions) -> int:
    start = time.perf_counter()
    if isinstance(command, ShardOptions):
        with _progress(f"shard {command.split}") as on_done:
            manifest = shard(command, on_done)
        for note in manifest.skipped[:MAX_SKIPPED_SHOWN]:
            print(f"skipped: {note.reason}", file=sys.stderr)
        if len(manifest.skipped) > MAX_SKIPPED_SHOWN:
            print(f"skipped: all {len(manifest.skipped)} are listed in {manifest.path}", file=sys.stderr)
        print(summary(manifest, time.perf_counter() - start))
    elif isinstance(command, BetonOptions):
        with _progress("beton", "images written or read back") as on_done:
            manifest = write_beton(command, on_done)
        record = manifest.beton
        assert record is not None
        seconds = time.perf_counter() - start
        print(
            f"{manifest.split}: {record.samples} pictures as {record.mode}, {record.bytes / 1e6:.1f} MB, written and "
            f"read back; {seconds:.1f} s, {record.samples / seconds:.0f} images/s: {manifest.folder / record.name}"
        )
    elif isinstance(command, VerifyOptions):
        with _progress("verify") as on_done:
            faults = verify(command, on_done)
        for fault in faults:
            print(f"fault: {fault}")
        seconds = time.perf_counter() - start
        print(f"{command.manifest}: {len(faults)} faults; {seconds:.1f} s")
        return 1 if faults else 0
    else:
        count = write_digits(command)
        print(f"digits: {count} pictures written: {command.out}" if count else f"digits: already there: {command.out}")
    return 0


def main() -> int:
    """Runs one command. Returns the exit status: 0, 1 (verify found faults), 2 (bad input), 130 (interrupted)."""
    # A scheduler's SIGTERM unwinds as an error does, so that temporary files go.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _run(tyro.cli(Command, prog="python -m data_prep", description=__doc__))
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept, the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("NOISYNN_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
