"""A Kubernetes Indexed Job with a headless Service: the core API only, nothing to install in the cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import tyro

from jobs import training
from jobs.launch import (
    Launch,
    duration_seconds,
    option_name,
    render,
    require_port,
    require_printable,
    run_tool,
)

DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")  # a Service's name (RFC 1035): starts with a letter
DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
LABEL_CHARACTERS = 63


@dataclass(frozen=True)
class KubernetesOptions:
    """Apply a Kubernetes Indexed Job. --run, --train and --val are paths as the pods see them, under --mount-path.

    Example: python -m jobs kubernetes noisy_vit_s16_in1k --run /data/runs/s16 --train
    /data/in1k/train.manifest.json --val /data/in1k/val.manifest.json --nodes 4 --gpus-per-node 8 --image
    registry.example/noisynn:1 --volume-claim imagenet --launch-folder launches/s16
    """

    training: tyro.conf.OmitArgPrefixes[training.TrainingOptions]
    image: str
    """Container image with the project and its requirements."""
    volume_claim: str
    """PersistentVolumeClaim with the shards and the runs; ReadWriteMany when --nodes is more than 1."""
    mount_path: str = "/data"
    """Where the pods see that claim."""
    launch_folder: str | None = None
    """Folder of this machine for the filled file; RUN/launch where --mount-path is mounted here too."""
    name: str | None = None
    """Name of Job and Service; made from the run folder's name when not given."""
    namespace: str | None = None
    """Namespace; the context's own when not given."""
    time: str = "48:00:00"
    """Time limit of the whole Job, restarts and waiting included, hours:minutes:seconds."""
    restarts: int = 3
    """How often the group may start again after a failure; evictions and preemptions do not count."""
    cpus_per_node: int | None = None
    """CPU cores requested for each pod."""
    memory: str | None = None
    """Memory of each pod, /dev/shm included, such as 200Gi."""
    shared_memory: str = "16Gi"
    """Size of /dev/shm, through which data workers hand over batches."""
    work_folder: str | None = None
    """Folder of the project inside the image; the image's own WORKDIR when not given."""
    port: int = 29500
    """Rendezvous port of the first pod."""
    python: str = "python"
    """Python inside the image."""


def plan(options: KubernetesOptions, extra: Sequence[str], command_line: str) -> Launch:
    """Fills the manifest of Service and Job.

    Raises:
        ValueError: naming the option and the mend.
    """
    require_printable(options)
    training.check(options.training, extra)
    _check(options)
    train = options.training
    name = job_name(options.name, PurePosixPath(train.run).name, train.nodes)
    text = render(
        "kubernetes.yaml.j2",
        command_line=command_line,
        name=name,
        rank_zero=f"{name}-0.{name}",  # an Indexed Job's hostname is <job>-<index>, the Service is its domain
        namespace=options.namespace,
        nodes=train.nodes,
        gpus_per_node=train.gpus_per_node,
        processes_per_node=train.processes_per_node,
        # when one pod fails the others follow, and the first often starts again too early and fails once more
        backoff_limit=options.restarts * 2 * train.nodes,
        limit_seconds=duration_seconds("--time", options.time),
        image=options.image,
        work_folder=options.work_folder,
        python=options.python,
        port=options.port,
        cpus_per_node=options.cpus_per_node,
        memory=options.memory,
        shared_memory=options.shared_memory,
        volume_claim=options.volume_claim,
        mount_path=options.mount_path,
        arguments=training.train_arguments(train, extra),
    )
    namespace = ["--namespace", options.namespace] if options.namespace else []

    def submit(manifest: Path) -> None:
        print(run_tool(["kubectl", "apply", *namespace, "-f", str(manifest)]))
        where = " ".join(["kubectl", *namespace])
        print(f"file: {manifest}\nlog: {where} logs -f job/{name}\nstop it: {where} delete job/{name} service/{name}")

    return Launch("kubernetes", ".yaml", text, _launch_folder(options), tool="kubectl", submit=submit)


def job_name(given: str | None, run_name: str, nodes: int) -> str:
    """A name that Job, Service and the pods' hostnames (name, hyphen, index) can all bear.

    A name that the user chose is refused when it cannot; one made from the run folder is made to fit. Two runs that
    come out alike do not harm each other: a Job's template cannot be changed, so the second is refused by Kubernetes.

    Raises:
        ValueError: with a name that would do.
    """
    longest = LABEL_CHARACTERS - len(f"-{nodes - 1}")
    fitting = re.sub(r"[^a-z0-9]+", "-", (given or run_name).lower()).strip("-")
    if fitting and not fitting[0].isalpha():
        fitting = f"run-{fitting}"
    fitting = fitting[:longest].rstrip("-")
    if not fitting:
        raise ValueError(f"--name: no Kubernetes name can be made from {given or run_name!r}; give one such as run-1")
    if given is not None and (not DNS_LABEL.fullmatch(given) or len(given) > longest):
        raise ValueError(
            f"--name: {given!r} is no Kubernetes name (a letter, then letters, digits and hyphens in lower case, "
            f"at most {longest}); {fitting!r} would do"
        )
    return fitting


def _check(options: KubernetesOptions) -> None:
    require_port(options.port)
    if options.restarts < 0:
        raise ValueError(f"--restarts: {options.restarts} is negative; give 0 for none")
    if options.cpus_per_node is not None and options.cpus_per_node < 1:
        raise ValueError(f"--cpus-per-node: {options.cpus_per_node} is less than 1; give the cores a pod may use")
    for field in ("memory", "shared_memory"):
        value = getattr(options, field)
        if value is not None and not QUANTITY.fullmatch(value):
            raise ValueError(f"{option_name(field)}: {value!r} is no quantity of Kubernetes; write it like 16Gi")
    for field in ("volume_claim", "namespace"):
        value = getattr(options, field)
        if value is not None and not DNS_SUBDOMAIN.fullmatch(value):
            raise ValueError(f"{option_name(field)}: {value!r} is no Kubernetes name; lower case, digits and hyphens")
    if any(character.isspace() for character in options.image):
        raise ValueError(f"--image: {options.image!r} holds a blank; write it like registry.example/noisynn:1")
    mount = PurePosixPath(options.mount_path)
    if not mount.is_absolute() or ":" in options.mount_path:
        raise ValueError(f"--mount-path: {options.mount_path!r} must be an absolute path without a colon, like /data")
    train = options.training
    for option, path in (("--run", train.run), ("--train", train.train), ("--val", train.val)):
        inside = mount in PurePosixPath(path).parents and ".." not in PurePosixPath(path).parts
        if not inside and not ("://" in path and option != "--run"):
            raise ValueError(f"{option}: {path} is not under --mount-path {mount}, so it would end with its pod")


def _launch_folder(options: KubernetesOptions) -> Path:
    if options.launch_folder is not None:
        return Path(options.launch_folder).expanduser()
    if options.training.submit and not Path(options.mount_path).is_dir():
        raise ValueError(
            f"--launch-folder: {options.mount_path} is not mounted on this machine; "
            f"say where the filled file shall be written"
        )
    return Path(options.training.run) / "launch"
