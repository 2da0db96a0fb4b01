"""``python -m jobs {local|slurm|kubernetes}``: fills a job file, writes it into the run folder and submits it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from jobs import kubernetes, local, slurm
from jobs.kubernetes import KubernetesOptions
from jobs.launch import Launch, require_tool, write_launch_file
from jobs.local import LocalOptions
from jobs.slurm import SlurmOptions

Options = LocalOptions | SlurmOptions | KubernetesOptions
Command = (
    Annotated[LocalOptions, tyro.conf.subcommand("local")]
    | Annotated[SlurmOptions, tyro.conf.subcommand("slurm")]
    | Annotated[KubernetesOptions, tyro.conf.subcommand("kubernetes")]
)
DESCRIPTION = """Launch `python -m pipeline train` on one machine, a Slurm cluster or Kubernetes.

The filled file is written to RUN/launch/ and submitted; --dry-run prints it instead. Options after a bare -- are handed
to the trainer as they are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 2 after one line on standard error when the input cannot be used.

    ``NOISYNN_TRACEBACK=1`` in the environment raises instead.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        own, extra = split_at_dashes(words)
        options = parse(own)
        launch = plan(options, extra, f"python -m jobs {shlex.join(words)}")
        if options.training.dry_run:
            sys.stdout.write(launch.text)
            return 0
        require_tool(launch)
        launch.submit(write_launch_file(launch))
    except (ValueError, OSError) as error:
        if os.environ.get("NOISYNN_TRACEBACK") == "1":
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def split_at_dashes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """This command's words, and those after the first bare ``--``."""
    end = words.index("--") if "--" in words else len(words)
    return list(words[:end]), list(words[end + 1 :])


def parse(words: Sequence[str]) -> Options:
    """tyro's parser, its boxed error folded into one line.

    Raises:
        ValueError: an unknown, missing or malformed option.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Command, args=words, prog="python -m jobs", description=DESCRIPTION)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise  # --help
        raise ValueError(fold_box(said.getvalue())) from None


def fold_box(box: str) -> str:
    """One line from a box of tyro's: frame and title gone, its sections parted by semicolons."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    text = " ".join("; " if re.fullmatch("─+", line) else line for line in lines)
    return re.sub(r"\s+;", ";", " ".join(text.split()))


def plan(options: Options, extra: Sequence[str], command_line: str) -> Launch:
    """The job file for these options."""
    if isinstance(options, LocalOptions):
        return local.plan(options, extra, command_line)
    if isinstance(options, SlurmOptions):
        return slurm.plan(options, extra, command_line)
    return kubernetes.plan(options, extra, command_line)


if __name__ == "__main__":
    sys.exit(main())
