"""Slurm batch jobs: a training with one torchrun agent on each node, and arrays of tasks."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from jobs import training
from jobs.launch import (
    Launch,
    Place,
    duration_seconds,
    render,
    require_import_path,
    require_port,
    require_printable,
    run_tool,
)
from jobs.work import BenchmarkOptions, DataPrepOptions, Work, WorkOptions, folder_of, work_of

CPUS_PER_PROCESS = 8  # Slurm's own default, one CPU a task, would leave a node's data loading to one core


@dataclass(frozen=True)
class SlurmResources:
    """What is asked of the cluster."""

    time: str = "48:00:00"
    """Time limit of one start, hours:minutes:seconds (or days-hours:minutes:seconds)."""
    partition: str | None = None
    """Partition; the site's default when not given."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features, in Slurm's own syntax."""
    cpus_per_node: int | None = None
    """CPU cores on each node; 8 for each process when not given."""
    memory: str | None = None
    """Memory on each node, such as 200G; the site's default when not given."""
    python: str | None = None
    """Python on the nodes; by default the one that runs this command, which they must see under the same path."""

    def filled(self, processes: int) -> dict[str, Any]:
        """What templates need of this."""
        cpus_per_node = CPUS_PER_PROCESS * processes if self.cpus_per_node is None else self.cpus_per_node
        if cpus_per_node < 1:
            raise ValueError(f"--cpus-per-node: {cpus_per_node} is less than 1; give the cores a node has")
        optional = {"partition": self.partition, "account": self.account, "qos": self.qos}
        return {
            "python": self.python or sys.executable,
            "cpus_per_node": cpus_per_node,
            "time": self.time,
            "optional": optional | {"constraint": self.constraint, "mem": self.memory},
        }


@dataclass(frozen=True)
class SlurmOptions:
    """Submit a Slurm batch job that trains.

    Example: python -m jobs slurm noisy_vit_s16_in1k --run /shared/runs/s16 --train
    /shared/in1k/train.manifest.json --val /shared/in1k/val.manifest.json --nodes 4 --gpus-per-node 8 --partition gpu
    """

    training: tyro.conf.OmitArgPrefixes[training.TrainingOptions]
    resources: tyro.conf.OmitArgPrefixes[SlurmResources] = SlurmResources()
    network_interface: str | None = None
    """Interface that carries the traffic between nodes (ib0), where they have several and the wrong one is taken."""
    port: int | None = None
    """Rendezvous port on the first node; by default one that follows from the job's number."""
    restarts: int = 3
    """How often the job starts again after a failure; stops by a signal, preemptions and lost nodes do not count."""


@dataclass(frozen=True)
class SlurmDataPrepOptions:
    """Submit data_prep, a split's shards spread over the tasks of an array.

    Example: python -m jobs slurm data_prep --tasks 16 --launch-folder /shared/in1k/launch --partition cpu --
    shard --source /raw/ILSVRC2012_img_train.tar --out /shared/in1k --processes 8
    """

    work: tyro.conf.OmitArgPrefixes[DataPrepOptions]
    resources: tyro.conf.OmitArgPrefixes[SlurmResources] = SlurmResources()


@dataclass(frozen=True)
class SlurmBenchmarkOptions:
    """Submit a benchmark on one node.

    Example: python -m jobs slurm benchmarks --gpus 1 --launch-folder /shared/bench --partition gpu -- noise
    """

    work: tyro.conf.OmitArgPrefixes[BenchmarkOptions]
    resources: tyro.conf.OmitArgPrefixes[SlurmResources] = SlurmResources()


def plan(options: SlurmOptions, extra: Sequence[str], command_line: str) -> Launch:
    """The batch script of a training.

    Raises:
        ValueError: naming the option and the mend.
    """
    require_printable(options)
    training.check(options.training, extra)
    train = training.with_absolute_paths(options.training)
    if train.submit:
        training.require_files(train)  # a file that is only printed may be meant for another machine
    if options.port is not None:
        require_port(options.port)
    if options.restarts < 0:
        raise ValueError(f"--restarts: {options.restarts} is negative; give 0 for none")
    limit_seconds = duration_seconds("--time", options.resources.time)
    reserve_seconds = min(300, limit_seconds // 5)
    resources = options.resources.filled(train.processes_per_node)
    launch_folder = Path(train.run) / "launch"
    require_usable("--run", launch_folder)

    def fill(place: Place) -> str:
        return render(
            "slurm.sh.j2",
            **common(place, command_line, f"noisynn-{Path(train.run).name}"),
            **resources,
            reserve_seconds=reserve_seconds,
            shutdown_seconds=max(5, reserve_seconds - 30),
            restarts=options.restarts,
            on_cpu=train.gpus_per_node == 0,
            nodes=train.nodes,
            gpus_per_node=train.gpus_per_node,
            processes_per_node=train.processes_per_node,
            network_interface=options.network_interface,
            port=options.port,
            arguments=training.train_arguments(train, extra),
        )

    configuration = {"command": command_line, "options": asdict(options), "options_after_dashes": list(extra)}
    return Launch("slurm", ".sh", fill, launch_folder, "sbatch", submit, configuration)


def plan_work(options: SlurmDataPrepOptions | SlurmBenchmarkOptions, extra: Sequence[str], command_line: str) -> Launch:
    """The batch script of an array, and of what follows it; or of one task.

    Raises:
        ValueError: naming the option and the mend.
    """
    require_printable(options)
    work_options: WorkOptions = options.work
    folder = folder_of(work_options)
    require_usable("--launch-folder", folder)
    duration_seconds("--time", options.resources.time)
    resources = options.resources.filled(1)
    work = work_of(work_options, extra, str(folder))

    def fill(place: Place) -> str:
        own = work_of(work_options, extra, str(place.folder))
        script = place.folder / "slurm.sh"
        return render(
            "slurm_work.sh.j2",
            **common(place, command_line, f"noisynn-{own.name}"),
            **resources,
            by_hand=[shlex.join(words) for words in submissions(own, script, "ARRAY")],
            gpus=own.gpus,
            words=own.words,
            last=own.last,
        )

    configuration = {"command": command_line, "options": asdict(options), "options_after_dashes": list(extra)}
    return Launch("slurm", ".sh", fill, folder, "sbatch", lambda script: submit_work(work, script), configuration)


def common(place: Place, command_line: str, job_name: str) -> dict[str, Any]:
    """What both templates need."""
    return {
        "command_line": command_line,
        "working_folder": os.getcwd(),
        "code_folder": str(place.code),
        "commit": place.commit,
        "job_name": job_name,
        "launch_folder": str(place.folder),
        "log": log_of(place.folder, "%j"),
    }


def log_of(folder: Path, job: str) -> str:
    """A log's path as sbatch reads it: it replaces %j and its like, and reads %% as %."""
    return f"{str(folder).replace('%', '%%')}/slurm-{job}.out"


def require_usable(option: str, folder: Path) -> None:
    """Refuses what sbatch or Python would read as something else."""
    require_import_path(option, folder)
    if "\\" in str(folder):
        raise ValueError(f"{option}: Slurm reads the backslash in {folder} as its own sign; choose another folder")


def submit(script: Path) -> None:
    """Hands the script to sbatch and says where to look."""
    job = sbatch(["sbatch", "--parsable", str(script)])
    print(f"submitted job {job}: {script}\nlog: {script.parent}/slurm-{job}.out\nstop it: scancel {job}")


def submit_work(work: Work, script: Path) -> None:
    """Hands over one task, or an array and what waits for all of it."""
    first = sbatch(submissions(work, script)[0])
    jobs = [first, *(sbatch(words) for words in submissions(work, script, first)[1:])]
    print(f"submitted job {' and '.join(jobs)}: {script}\nlogs: {script.parent}/slurm-*.out")
    print(f"stop it: scancel {' '.join(jobs)}")


def submissions(work: Work, script: Path, array: str = "") -> list[list[str]]:
    """The calls of sbatch. array: the first one's answer."""
    if work.tasks == 1:
        return [["sbatch", "--parsable", str(script)]]
    log = log_of(script.parent, "%A_%a")
    # invalid: where a task has failed the end would wait for ever
    after = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", "--cpus-per-task=1"]
    spread = ["sbatch", "--parsable", f"--array=0-{work.tasks - 1}", f"--output={log}", str(script)]
    return [spread, *([["sbatch", "--parsable", *after, str(script), "last"]] if work.last else [])]


def sbatch(command: Sequence[str]) -> str:
    """The job's number."""
    return run_tool(command).split(";")[0]  # "id" or "id;cluster"
