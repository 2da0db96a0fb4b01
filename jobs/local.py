"""A run on this machine: torchrun by itself, with a rendezvous of its own."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jobs import training
from jobs.launch import CODE_FOLDER, Launch, render, require_printable


@dataclass(frozen=True)
class LocalOptions:
    """Train on this machine, in the foreground.

    Example: python -m jobs local demo --run runs/demo --train shards/train.manifest.json
    --val shards/val.manifest.json --gpus-per-node 0 --processes 2
    """

    training: tyro.conf.OmitArgPrefixes[training.TrainingOptions]
    python: str | None = None
    """Python to run; the one that runs this command by default."""


def plan(options: LocalOptions, extra: Sequence[str], command_line: str) -> Launch:
    """Fills the script.

    Raises:
        ValueError: naming the option and the mend.
    """
    require_printable(options)
    training.check(options.training, extra)
    if options.training.nodes != 1:
        raise ValueError(f"--nodes: local is one machine, not {options.training.nodes}; use slurm or kubernetes")
    train = training.with_absolute_paths(options.training)
    training.require_files(train)
    text = render(
        "local.sh.j2",
        command_line=command_line,
        code_folder=str(CODE_FOLDER),
        python=options.python or sys.executable,
        on_cpu=train.gpus_per_node == 0,
        processes_per_node=train.processes_per_node,
        arguments=training.train_arguments(train, extra),
    )
    return Launch("local", ".sh", text, Path(train.run) / "launch", tool="bash", submit=execute)


def execute(script: Path) -> None:
    """Becomes the script, so that signals and the exit status are torchrun's; does not return."""
    print(f"running {script}", flush=True)
    bash = shutil.which("bash")
    assert bash is not None, "require_tool has looked"
    os.execv(bash, ["bash", str(script)])
