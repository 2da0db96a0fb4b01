"""A run on this machine, in the foreground: torchrun by itself, with a rendezvous of its own; or other work."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from jobs import training
from jobs.launch import Launch, Place, render, require_import_path, require_printable
from jobs.work import BenchmarkOptions, DataPrepOptions, WorkOptions, folder_of, work_of

SHUTDOWN_SECONDS = 300  # that ranks have to save after a signal


@dataclass(frozen=True)
class LocalOptions:
    """Train on this machine, in the foreground.

    Example: python -m jobs local demo --run runs/demo --train shards/train.manifest.json
    --val shards/val.manifest.json --gpus-per-node 0 --processes 2
    """

    training: tyro.conf.OmitArgPrefixes[training.TrainingOptions]
    python: str | None = None
    """Python to run; the one that runs this command by default."""


@dataclass(frozen=True)
class LocalDataPrepOptions:
    """Run data_prep on this machine, in the foreground; its tasks all at once.

    Example: python -m jobs local data_prep --launch-folder shards/launch -- shard --source pictures --out shards
    """

    work: tyro.conf.OmitArgPrefixes[DataPrepOptions]
    python: str | None = None
    """Python to run; the one that runs this command by default."""


@dataclass(frozen=True)
class LocalBenchmarkOptions:
    """Run a benchmark on this machine, in the foreground.

    Example: python -m jobs local benchmarks --launch-folder runs/bench -- loader
    """

    work: tyro.conf.OmitArgPrefixes[BenchmarkOptions]
    python: str | None = None
    """Python to run; the one that runs this command by default."""


def plan(options: LocalOptions, extra: Sequence[str], command_line: str) -> Launch:
    """The script of a training.

    Raises:
        ValueError: naming the option and the mend.
    """
    require_printable(options)
    training.check(options.training, extra)
    if options.training.nodes != 1:
        raise ValueError(f"--nodes: local is one machine, not {options.training.nodes}; use slurm or kubernetes")
    train = training.with_absolute_paths(options.training)
    require_import_path("--run", Path(train.run))
    training.require_files(train)

    def fill(place: Place) -> str:
        return render(
            "local.sh.j2",
            **common(place, command_line, options.python),
            shutdown_seconds=SHUTDOWN_SECONDS,
            on_cpu=train.gpus_per_node == 0,
            processes_per_node=train.processes_per_node,
            arguments=training.train_arguments(train, extra),
        )

    configuration = {"command": command_line, "options": asdict(options), "options_after_dashes": list(extra)}
    return Launch("local", ".sh", fill, Path(train.run) / "launch", "bash", execute, configuration)


def plan_work(options: LocalDataPrepOptions | LocalBenchmarkOptions, extra: Sequence[str], command_line: str) -> Launch:
    """The script of other work.

    Raises:
        ValueError: naming the option and the mend.
    """
    require_printable(options)
    work_options: WorkOptions = options.work
    folder = folder_of(work_options)
    require_import_path("--launch-folder", folder)
    work_of(work_options, extra, str(folder))  # refuses now what could not run

    def fill(place: Place) -> str:
        work = work_of(work_options, extra, str(place.folder))
        filled = {"words": work.words, "last": work.last, "tasks": work.tasks, "gpus": work.gpus}
        return render("local_work.sh.j2", **common(place, command_line, options.python), **filled)

    configuration = {"command": command_line, "options": asdict(options), "options_after_dashes": list(extra)}
    return Launch("local", ".sh", fill, folder, "bash", execute, configuration)


def common(place: Place, command_line: str, python: str | None) -> dict[str, Any]:
    """What both templates need."""
    return {
        "command_line": command_line,
        "working_folder": os.getcwd(),
        "code_folder": str(place.code),
        "commit": place.commit,
        "python": python or sys.executable,
    }


def execute(script: Path) -> None:
    """Becomes the script, so that signals and the exit status are torchrun's; does not return."""
    print(f"running {script}", flush=True)
    bash = shutil.which("bash")
    assert bash is not None, "require_tool has looked"
    os.execv(bash, ["bash", str(script)])
