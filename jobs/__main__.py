"""``python -m jobs {local|slurm|kubernetes|demo}``: prints a filled job file, or submits it; or runs the demo."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from jobs import kubernetes, local, slurm
from jobs.demo import DemoOptions, run_demo
from jobs.kubernetes import KubernetesBenchmarkOptions, KubernetesDataPrepOptions, KubernetesOptions
from jobs.launch import Launch, require_tool, write_launch
from jobs.local import LocalBenchmarkOptions, LocalDataPrepOptions, LocalOptions
from jobs.slurm import SlurmBenchmarkOptions, SlurmDataPrepOptions, SlurmOptions

Training = LocalOptions | SlurmOptions | KubernetesOptions
OtherWork = (
    LocalDataPrepOptions
    | LocalBenchmarkOptions
    | SlurmDataPrepOptions
    | SlurmBenchmarkOptions
    | KubernetesDataPrepOptions
    | KubernetesBenchmarkOptions
)
Command = (
    Annotated[LocalOptions, tyro.conf.subcommand("local")]
    | Annotated[SlurmOptions, tyro.conf.subcommand("slurm")]
    | Annotated[KubernetesOptions, tyro.conf.subcommand("kubernetes")]
    | Annotated[DemoOptions, tyro.conf.subcommand("demo")]
)
# In the place of a recipe: no recipe can be called so, for these are packages beside pipeline.
OTHER_WORK = {
    ("local", "data_prep"): LocalDataPrepOptions,
    ("local", "benchmarks"): LocalBenchmarkOptions,
    ("slurm", "data_prep"): SlurmDataPrepOptions,
    ("slurm", "benchmarks"): SlurmBenchmarkOptions,
    ("kubernetes", "data_prep"): KubernetesDataPrepOptions,
    ("kubernetes", "benchmarks"): KubernetesBenchmarkOptions,
}
DESCRIPTION = """Launch `python -m pipeline train` on one machine, a Slurm cluster or Kubernetes; or run the demo.

Prints the filled job file; --submit writes it to RUN/launch/<n>/, with a copy of the code, and submits it. Options
after a bare -- are handed to the trainer as they are. `data_prep` or `benchmarks` in the place of a recipe launches
`python -m data_prep` or `python -m benchmarks` with what follows a bare --."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 2 after one line on standard error when the input cannot be used.

    ``NOISYNN_TRACEBACK=1`` in the environment raises instead.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        own, extra = split_at_dashes(words)
        options = parse(own)
        if isinstance(options, DemoOptions):
            if extra:
                raise ValueError(f"demo takes no options after --, such as {extra[0]}: leave them out")
            return run_demo(options)
        launch = plan(options, extra, f"python -m jobs {shlex.join(words)}")
        wanted = options.training if isinstance(options, Training) else options.work
        if not wanted.submit:
            sys.stdout.write(launch.printed())
            return 0
        require_tool(launch)
        launch.submit(write_launch(launch))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
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


def parse(words: Sequence[str]) -> Training | OtherWork | DemoOptions:
    """tyro's parser, its boxed error folded into one line.

    Raises:
        ValueError: an unknown, missing or malformed option.
    """
    said = io.StringIO()
    other: Any = OTHER_WORK.get((words[0], words[1])) if len(words) > 1 else None
    try:
        with contextlib.redirect_stderr(said):
            if other is not None:
                return tyro.cli(other, args=words[2:], prog=f"python -m jobs {words[0]} {words[1]}")
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


def plan(options: Training | OtherWork, extra: Sequence[str], command_line: str) -> Launch:
    """The job file for these options."""
    match options:
        case LocalOptions():
            return local.plan(options, extra, command_line)
        case SlurmOptions():
            return slurm.plan(options, extra, command_line)
        case KubernetesOptions():
            return kubernetes.plan(options, extra, command_line)
        case LocalDataPrepOptions() | LocalBenchmarkOptions():
            return local.plan_work(options, extra, command_line)
        case SlurmDataPrepOptions() | SlurmBenchmarkOptions():
            return slurm.plan_work(options, extra, command_line)
        case _:
            return kubernetes.plan_work(options, extra, command_line)


if __name__ == "__main__":
    sys.exit(main())
