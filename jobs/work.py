"""Jobs that train by no recipe: ``data_prep`` and ``benchmarks``, each of them spread over the tasks of an array.

What follows a bare ``--`` is the command: ``python -m jobs slurm data_prep --tasks 16 ... -- shard --source ...`` runs
``python -m data_prep shard --source ...`` sixteen times over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jobs.launch import require_printable_text

# The one command of each whose work is divided.
SPREAD = {"data_prep": "shard", "benchmarks": "accuracy"}


@dataclass(frozen=True)
class DataPrepOptions:
    """What follows a bare -- goes to `python -m data_prep`."""

    launch_folder: str
    """Folder for job file, copy of the code, and logs."""
    tasks: int = 1
    """Tasks that share the shards of a split (of `shard` alone); `finalize` runs once all have ended well."""
    submit: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the job file and submit it. Without this it is printed, and nothing happens."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """What follows a bare -- goes to `python -m benchmarks`."""

    launch_folder: str
    """Folder for job file, copy of the code, logs, and results where the command has no --output."""
    tasks: int = 1
    """Tasks that share the cells of a grid (of `accuracy` alone) and the file of results."""
    gpus: int = 0
    """GPUs of each machine that measures."""
    submit: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the job file and submit it. Without this it is printed, and nothing happens."""


WorkOptions = DataPrepOptions | BenchmarkOptions


@dataclass(frozen=True)
class Work:
    """One command, its tasks, and what runs after all of them."""

    name: str
    words: tuple[str, ...]  # after `python -m`, the same for each task
    tasks: int
    gpus: int
    last: tuple[str, ...] = ()  # after `python -m`, once


def work_of(options: WorkOptions, extra: Sequence[str], folder: str) -> Work:
    """What to run. folder: where results go that have no place of their own.

    Raises:
        ValueError: naming the option and the mend.
    """
    package = "data_prep" if isinstance(options, DataPrepOptions) else "benchmarks"
    if not extra or extra[0].startswith("-"):
        raise ValueError(f"{package}: say what to run after a bare --, like `-- {_EXAMPLES[package]}`")
    for word in extra:
        require_printable_text("options after --", word)
    if isinstance(options, BenchmarkOptions):
        if options.gpus < 0:
            raise ValueError(f"--gpus: {options.gpus} is negative; give 0 for a measurement on the CPU")
        output = () if value_of("--output", extra) else ("--output", f"{folder}/{extra[0]}.jsonl")
        words = (package, *extra, *output, *_spread_words(package, options.tasks, extra))
        return Work(f"{package}-{extra[0]}", words, options.tasks, options.gpus)
    return _data_prep_work(options, extra)


_EXAMPLES = {"data_prep": "shard --source PICTURES --out SHARDS", "benchmarks": "loader"}


def _data_prep_work(options: DataPrepOptions, extra: Sequence[str]) -> Work:
    words = ("data_prep", *extra, *_spread_words("data_prep", options.tasks, extra))
    name = f"data_prep-{extra[0]}"
    if options.tasks == 1:
        return Work(name, words, 1, 0)
    out = value_of("--out", extra)
    if out is None:
        raise ValueError("options after --: --out is missing, the folder that all tasks write into")
    split = ("--split", value_of("--split", extra) or "train")
    return Work(name, words, options.tasks, 0, ("data_prep", "finalize", "--out", out, *split))


def _spread_words(package: str, tasks: int, extra: Sequence[str]) -> tuple[str, ...]:
    """What tells each task of how many it is one."""
    if tasks < 1:
        raise ValueError(f"--tasks: {tasks} tasks cannot work; give 1 or more")
    if tasks == 1:
        return ()
    if extra[0] != (spread := SPREAD[package]):
        raise ValueError(f"--tasks: `{extra[0]}` is one task's work, only `{spread}` is divided; leave --tasks out")
    for own in ("--task", "--num-tasks"):
        if value_of(own, extra) is not None:
            raise ValueError(f"options after --: {own} would be given twice; use --tasks before the --")
    return ("--num-tasks", str(tasks))


def value_of(option: str, words: Sequence[str]) -> str | None:
    """An option's value among words, the last where it is given twice."""
    found = None
    for at, word in enumerate(words):
        if word == option and at + 1 < len(words):
            found = words[at + 1]
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def folder_of(options: WorkOptions) -> Path:
    return Path(options.launch_folder).expanduser().absolute()
