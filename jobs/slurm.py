"""A Slurm batch job: one torchrun agent on each node, under srun."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jobs import training
from jobs.launch import (
    CODE_FOLDER,
    Launch,
    duration_seconds,
    render,
    require_port,
    require_printable,
    run_tool,
)

CPUS_PER_PROCESS = 8  # Slurm's own default, one CPU a task, would leave a node's data loading to one core


@dataclass(frozen=True)
class SlurmOptions:
    """Submit a Slurm batch job.

    Example: python -m jobs slurm noisy_vit_s16_in1k --run /shared/runs/s16 --train
    /shared/in1k/train.manifest.json --val /shared/in1k/val.manifest.json --nodes 4 --gpus-per-node 8 --partition gpu
    """

    training: tyro.conf.OmitArgPrefixes[training.TrainingOptions]
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
    network_interface: str | None = None
    """Interface that carries the traffic between nodes (ib0), where they have several and the wrong one is taken."""
    port: int | None = None
    """Rendezvous port on the first node; by default one that follows from the job's number."""
    python: str | None = None
    """Python on the nodes; by default the one that runs this command, which they must see under the same path."""


def plan(options: SlurmOptions, extra: Sequence[str], command_line: str) -> Launch:
    """Fills the batch script.

    Raises:
        ValueError: naming the option and the mend.
    """
    require_printable(options)
    training.check(options.training, extra)
    train = training.with_absolute_paths(options.training)
    if train.submit:
        training.require_files(train)  # a file that is only printed may be meant for another machine
    if "\\" in train.run:
        raise ValueError(f"--run: Slurm reads the backslash in {train.run} as its own sign; choose another folder")
    if options.port is not None:
        require_port(options.port)
    cpus_per_node = options.cpus_per_node
    if cpus_per_node is None:
        cpus_per_node = CPUS_PER_PROCESS * train.processes_per_node
    if cpus_per_node < 1:
        raise ValueError(f"--cpus-per-node: {cpus_per_node} is less than 1; give the cores a node has")
    limit_seconds = duration_seconds("--time", options.time)
    reserve_seconds = min(300, limit_seconds // 5)
    launch_folder = Path(train.run) / "launch"
    text = render(
        "slurm.sh.j2",
        command_line=command_line,
        code_folder=str(CODE_FOLDER),
        python=options.python or sys.executable,
        job_name=f"noisynn-{Path(train.run).name}",
        # sbatch replaces %j and its like in a log's path, and reads %% as %
        log=f"{str(launch_folder).replace('%', '%%')}/slurm-%j.out",
        launch_folder=str(launch_folder),
        run_seconds=limit_seconds - reserve_seconds,
        kill_after_seconds=reserve_seconds // 2,
        cpus_per_node=cpus_per_node,
        on_cpu=train.gpus_per_node == 0,
        nodes=train.nodes,
        gpus_per_node=train.gpus_per_node,
        processes_per_node=train.processes_per_node,
        time=options.time,
        optional={"partition": options.partition, "account": options.account, "qos": options.qos}
        | {"constraint": options.constraint, "mem": options.memory},
        network_interface=options.network_interface,
        port=options.port,
        arguments=training.train_arguments(train, extra),
    )
    return Launch("slurm", ".sh", text, launch_folder, tool="sbatch", submit=submit)


def submit(script: Path) -> None:
    """Hands the script to sbatch and says where to look."""
    job = run_tool(["sbatch", "--parsable", str(script)]).split(";")[0]  # "id" or "id;cluster"
    print(f"submitted job {job}: {script}\nlog: {script.parent}/slurm-{job}.out\nstop it: scancel {job}")
