"""The command that every kind of job runs: ``python -m pipeline train`` under torchrun."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.launch import require_printable_text

SET_HERE = ("--run", "--data.train", "--data.val")  # given twice, the trainer and the job file would disagree


@dataclass(frozen=True)
class TrainingOptions:
    """What is trained, on what, by how many machines. Whatever follows a bare -- goes to `python -m pipeline train`."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """Recipe to train: a module of pipeline/recipes."""
    run: str
    """Run folder: checkpoints, logs, and launch/ with the job file. Launched again, the run goes on from there."""
    train: str
    """Manifest of the training split, as data_prep writes it."""
    val: str
    """Manifest of the validation split."""
    gpus_per_node: int
    """GPUs on each machine, one process each; 0 trains on the CPU, with --processes."""
    nodes: int = 1
    """Machines."""
    processes: int | None = None
    """Processes on each machine when --gpus-per-node is 0."""
    submit: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the job file into the run folder and submit it. Without this it is printed, and nothing happens."""

    @property
    def processes_per_node(self) -> int:
        return self.gpus_per_node or self.processes or 1


def known_recipes() -> tuple[str, ...]:
    """The recipes' names; imported late, so that --help does not depend on them."""
    from pipeline.recipes import recipe_names

    return tuple(recipe_names())


def check(options: TrainingOptions, extra: Sequence[str]) -> None:
    """Refuses what no kind of job can run.

    Raises:
        ValueError: naming the option and the mend.
    """
    names = known_recipes()
    if options.recipe not in names:
        nearest = difflib.get_close_matches(options.recipe, names, n=3, cutoff=0.4) or names
        raise ValueError(f"RECIPE: there is no recipe {options.recipe!r}; nearest: {', '.join(nearest)}")
    if options.nodes < 1:
        raise ValueError(f"--nodes: {options.nodes} machines cannot train; give 1 or more")
    if options.gpus_per_node < 0:
        raise ValueError(f"--gpus-per-node: {options.gpus_per_node} is negative; give 0 for a CPU run")
    if options.gpus_per_node == 0 and options.processes is None:
        raise ValueError("--gpus-per-node: 0 means a CPU run; say how many processes with --processes")
    if options.gpus_per_node > 0 and options.processes is not None:
        raise ValueError("--processes: a GPU run has one process for each GPU; leave it out, or set --gpus-per-node 0")
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"--processes: {options.processes} processes cannot train; give 1 or more")
    for argument in extra:
        require_printable_text("options after --", argument)
        if argument.split("=", 1)[0] in SET_HERE:
            own = argument.split("=", 1)[0].replace("--data.", "--")
            raise ValueError(f"options after --: {argument} would be given twice; use {own} before the --")


def with_absolute_paths(options: TrainingOptions) -> TrainingOptions:
    """The same options with paths that hold in any working folder; URLs stay as they are."""

    def absolute(path: str) -> str:
        return path if "://" in path else os.path.abspath(os.path.expanduser(path))

    return dataclasses.replace(
        options, run=absolute(options.run), train=absolute(options.train), val=absolute(options.val)
    )


def require_files(options: TrainingOptions) -> None:
    """Refuses a manifest that is not on this machine.

    Raises:
        ValueError: naming the option and the file.
    """
    for option, path in (("--train", options.train), ("--val", options.val)):
        if "://" not in path and not os.path.isfile(path):
            raise ValueError(
                f"{option}: {path} is not a file; give the manifest that `python -m data_prep` has written"
            )


def train_arguments(options: TrainingOptions, extra: Sequence[str]) -> tuple[str, ...]:
    """What follows torchrun's own options.

    Without ``--resume``: the trainer goes on by itself from the newest checkpoint, or begins where there is none.
    ``--`` before the module's name, because torchrun's argparse reads the trainer's options too, takes ``--run`` for a
    short form of its own ``--run-path`` or ``--run_path``, and gives up.
    ``$$`` for each dollar, because torchrun fills ``${local_rank}`` into the arguments and makes ``$`` of ``$$``.
    """
    paths = ("--run", options.run, "--data.train", options.train, "--data.val", options.val)
    words = ("train", options.recipe, *paths, *extra)
    return ("-m", "--", "pipeline", *(word.replace("$", "$$") for word in words))
