"""Command line: python -m data_prep shard | finalize | index | beton | verify | inspect | stats | digits."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Annotated, Any

import tyro

from data_prep.beton import BetonOptions, write_beton
from data_prep.contact_sheet import InspectOptions, inspect
from data_prep.digits import DigitsOptions, write_digits
from data_prep.distribute import ShardOptions, shard
from data_prep.finalize import FinalizeOptions, finalize
from data_prep.foreign import IndexOptions, index
from data_prep.manifest import Manifest, manifest_path
from data_prep.parts import restart_marker_outcomes
from data_prep.progress import progress
from data_prep.stats import StatsOptions, stats
from data_prep.storage import open_folder
from data_prep.summary import manifest_summary, rates, shards_line, timing
from data_prep.tasks import Task
from data_prep.verify import VerifyOptions, verify

Command = (
    Annotated[ShardOptions, tyro.conf.subcommand("shard")]
    | Annotated[FinalizeOptions, tyro.conf.subcommand("finalize")]
    | Annotated[IndexOptions, tyro.conf.subcommand("index")]
    | Annotated[BetonOptions, tyro.conf.subcommand("beton")]
    | Annotated[VerifyOptions, tyro.conf.subcommand("verify")]
    | Annotated[InspectOptions, tyro.conf.subcommand("inspect")]
    | Annotated[StatsOptions, tyro.conf.subcommand("stats")]
    | Annotated[DigitsOptions, tyro.conf.subcommand("digits")]
)

MAX_SKIPPED_SHOWN = 10


def _shard(command: ShardOptions) -> tuple[dict[str, Any], str]:
    start = time.perf_counter()
    with progress(f"shard {command.split}") as on_done:
        done = shard(command, on_done)
    if isinstance(done, Task):
        line = (
            f"{command.split}: task {done.index} of {done.count} has written its shards; once all have: "
            f"python -m data_prep finalize --out {command.out} --split {command.split}"
        )
        return {"split": command.split, "task": done.index, "num_tasks": done.count}, line
    return _described(done, command.out, time.perf_counter() - start)


def _finalize(command: FinalizeOptions) -> tuple[dict[str, Any], str]:
    start = time.perf_counter()
    return _described(finalize(command), command.out, time.perf_counter() - start)


def _described(manifest: Manifest, out: str, seconds: float) -> tuple[dict[str, Any], str]:
    folder = open_folder(out)
    where = folder.where(manifest.path.name)
    for note in manifest.skipped[:MAX_SKIPPED_SHOWN]:
        print(f"skipped: {note.path}: {note.reason}", file=sys.stderr)
    if len(manifest.skipped) > MAX_SKIPPED_SHOWN:
        print(f"skipped: all {len(manifest.skipped)} are listed in {where}", file=sys.stderr)
    summary = manifest_summary(manifest, where, seconds, restart_marker_outcomes(folder, manifest))
    return summary, shards_line(summary)


def _index(command: IndexOptions) -> tuple[dict[str, Any], str]:
    start = time.perf_counter()
    with progress(f"index {command.split}") as on_done:
        manifest = index(command, on_done)
    summary = manifest_summary(manifest, str(manifest.path), time.perf_counter() - start)
    hint = "" if command.hash else " (nothing can be verified, nor trained on, until `index --hash` was run)"
    return summary, shards_line(summary) + hint


def _beton(command: BetonOptions) -> tuple[dict[str, Any], str]:
    start = time.perf_counter()
    with progress("beton", "images written or checked") as on_done:
        manifest = write_beton(command, on_done)
    record = manifest.beton
    assert record is not None
    where = str(manifest.folder / record.name)
    summary = {
        "split": manifest.split,
        "beton": where,
        "manifest": str(manifest_path(manifest.folder, manifest.split)),
        "images": record.samples,
        "bytes": record.bytes,
        "mode": record.mode,
        **rates(record.samples, record.bytes, time.perf_counter() - start),
    }
    line = (
        f"{manifest.split}: {record.samples} pictures as {record.mode}, {record.bytes / 1e6:.1f} MB; "
        f"{timing(summary)}: {where}"
    )
    return summary, line


def _verify(command: VerifyOptions) -> tuple[dict[str, Any], str]:
    start = time.perf_counter()
    with progress("verify") as on_done:
        faults = verify(command, on_done)
    seconds = time.perf_counter() - start
    summary = {"manifest": command.manifest, "faults": faults, "seconds": round(seconds, 3)}
    return summary, "\n".join(
        [*(f"fault: {fault}" for fault in faults), f"{command.manifest}: {len(faults)} faults; {seconds:.1f} s"]
    )


def _digits(command: DigitsOptions) -> tuple[dict[str, Any], str]:
    count = write_digits(command)
    line = f"digits: {count} pictures written: {command.out}" if count else f"digits: already there: {command.out}"
    return {"images": count, "out": str(command.out)}, line


def _run(command: Command) -> tuple[dict[str, Any], str]:
    """Runs a command; returns its summary, and the same in words."""
    if isinstance(command, ShardOptions):
        return _shard(command)
    if isinstance(command, FinalizeOptions):
        return _finalize(command)
    if isinstance(command, IndexOptions):
        return _index(command)
    if isinstance(command, BetonOptions):
        return _beton(command)
    if isinstance(command, VerifyOptions):
        return _verify(command)
    if isinstance(command, InspectOptions):
        sheet = inspect(command)
        return sheet.to_json(), sheet.line()
    if isinstance(command, StatsOptions):
        with progress("stats") as on_done:
            found = stats(command, on_done)
        return found.to_json(), found.text()
    return _digits(command)


def _answer(command: Command, json_summary: bool) -> int:
    summary, words = _run(command)
    print(json.dumps(summary, ensure_ascii=False) if json_summary else words)
    return 1 if summary.get("faults") else 0


def _command_line(command: Command, json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False) -> int:
    """Raw pictures to shards, and back.

    Args:
        command: What to do.
        json: Print the summary at the end as JSON.
    """
    return _answer(command, json)


def main() -> int:
    """Runs one command. Returns the exit status: 0, 1 (verify found faults), 2 (bad input), 130 (interrupted)."""
    # A scheduler's SIGTERM unwinds as an error does, so that temporary files go.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    config = (tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitSubcommandPrefixes)
    try:
        return tyro.cli(_command_line, prog="python -m data_prep", description=__doc__, config=config)
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
