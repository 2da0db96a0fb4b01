"""A Kubernetes Indexed Job with a headless Service: the core API only, nothing to install in the cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import tyro

from jobs import training
from jobs.launch import (
    Launch,
    Place,
    duration_seconds,
    option_name,
    render,
    require_port,
    require_printable,
    run_tool,
)
from jobs.work import BenchmarkOptions, DataPrepOptions, WorkOptions, folder_of, work_of

DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")  # a Service's name (RFC 1035): starts with a letter
DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
LABEL_CHARACTERS = 63
GRACE_SECONDS = 120  # from a pod's SIGTERM to its SIGKILL
# The first task joins what all have written, once it is there; a Job cannot wait for another. `finalize` names what is
# missing, so the log tells how far it is. activeDeadlineSeconds ends the waiting.
JOIN = """python=$1 out=$2 split=$3; shift 3
"$python" -m "$@" || exit "$?"
[ "$JOB_COMPLETION_INDEX" = 0 ] || exit 0
until "$python" -m data_prep finalize --out "$out" --split "$split"; do sleep "${JOIN_SECONDS:-30}"; done"""


@dataclass(frozen=True)
class KubernetesResources:
    """What is asked of the cluster."""

    image: str
    """Container image with the project and its requirements."""
    volume_claim: str
    """PersistentVolumeClaim with the shards and the runs; ReadWriteMany when there are several pods."""
    mount_path: str = "/data"
    """Where the pods see that claim."""
    name: str | None = None
    """Name of the Job; made from the run or the command when not given."""
    namespace: str | None = None
    """Namespace; the context's own when not given."""
    secret: str | None = None
    """Secret whose keys are the pods' environment variables, such as an object store's; its values go into no file."""
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
    python: str = "python"
    """Python inside the image."""


@dataclass(frozen=True)
class KubernetesOptions:
    """Apply a Kubernetes Indexed Job that trains. --run, --train and --val are paths as the pods see them.

    Example: python -m jobs kubernetes noisy_vit_s16_in1k --run /data/runs/s16 --train
    /data/in1k/train.manifest.json --val /data/in1k/val.manifest.json --nodes 4 --gpus-per-node 8 --image
    registry.example/noisynn:1 --volume-claim imagenet --launch-folder launches/s16
    """

    training: tyro.conf.OmitArgPrefixes[training.TrainingOptions]
    resources: tyro.conf.OmitArgPrefixes[KubernetesResources]
    launch_folder: str | None = None
    """Folder of this machine for the filled file; RUN/launch where --mount-path is mounted here too."""
    port: int = 29500
    """Rendezvous port of the first pod."""


@dataclass(frozen=True)
class KubernetesDataPrepOptions:
    """Apply a Kubernetes Indexed Job of data_prep. Paths after -- are as the pods see them.

    Example: python -m jobs kubernetes data_prep --tasks 16 --launch-folder launches/shards --image
    registry.example/noisynn:1 --volume-claim imagenet -- shard --source /data/raw --out /data/in1k
    """

    work: tyro.conf.OmitArgPrefixes[DataPrepOptions]
    resources: tyro.conf.OmitArgPrefixes[KubernetesResources]


@dataclass(frozen=True)
class KubernetesBenchmarkOptions:
    """Apply a Kubernetes Job that measures on one node.

    Example: python -m jobs kubernetes benchmarks --gpus 1 --launch-folder launches/bench --image
    registry.example/noisynn:1 --volume-claim imagenet -- noise --output /data/bench/noise.jsonl
    """

    work: tyro.conf.OmitArgPrefixes[BenchmarkOptions]
    resources: tyro.conf.OmitArgPrefixes[KubernetesResources]


def plan(options: KubernetesOptions, extra: Sequence[str], command_line: str) -> Launch:
    """The manifest of a training's Service and Job.

    Raises:
        ValueError: naming the option and the mend.
    """
    require_printable(options)
    training.check(options.training, extra)
    require_port(options.port)
    train, resources = options.training, options.resources
    _check(resources)
    _check_paths(train, resources)
    name = job_name(resources.name, PurePosixPath(train.run).name, train.nodes)

    def fill(place: Place) -> str:
        return render(
            "kubernetes.yaml.j2",
            **common(resources, name, command_line, place),
            training=True,
            words=(),
            rank_zero=f"{name}-0.{name}",  # an Indexed Job's hostname is <job>-<index>, the Service is its domain
            pods=train.nodes,
            gpus=train.gpus_per_node,
            processes_per_node=train.processes_per_node,
            # when one pod fails the others follow, and the first often starts again too early and fails once more
            backoff_limit=resources.restarts * 2 * train.nodes,
            port=options.port,
            shutdown_seconds=GRACE_SECONDS - 30,
            arguments=training.train_arguments(train, extra),
        )

    return _launch(options, extra, command_line, fill, name, _launch_folder(options))


def plan_work(
    options: KubernetesDataPrepOptions | KubernetesBenchmarkOptions, extra: Sequence[str], command_line: str
) -> Launch:
    """The manifest of other work's Job.

    Raises:
        ValueError: naming the option and the mend.
    """
    require_printable(options)
    work_options: WorkOptions = options.work
    resources = options.resources
    _check(resources)
    if isinstance(work_options, BenchmarkOptions) and "--output" not in {word.split("=")[0] for word in extra}:
        raise ValueError(
            "options after --: --output is missing, a .jsonl file under --mount-path that outlives the pod"
        )
    folder = folder_of(work_options)
    work = work_of(work_options, extra, str(folder))
    name = job_name(resources.name, work.name, work.tasks)
    words: tuple[str, ...] = (resources.python, "-m", *work.words)
    if work.last:
        _, _, _, out, _, split = work.last
        words = ("bash", "-c", JOIN, "data_prep", resources.python, out, split, *work.words)

    def fill(place: Place) -> str:
        return render(
            "kubernetes.yaml.j2",
            **common(resources, name, command_line, place),
            training=False,
            words=words,
            pods=work.tasks,
            gpus=work.gpus,
            backoff_limit=resources.restarts * work.tasks,
        )

    return _launch(options, extra, command_line, fill, name, folder)


def common(resources: KubernetesResources, name: str, command_line: str, place: Place) -> dict[str, Any]:
    """What the manifest needs for any work."""
    own = ("namespace", "image", "secret", "work_folder", "python", "cpus_per_node", "memory", "shared_memory")
    return {
        "command_line": command_line,
        "commit": place.commit,
        "name": name,
        "grace_seconds": GRACE_SECONDS,
        "limit_seconds": duration_seconds("--time", resources.time),
        "volume_claim": resources.volume_claim,
        "mount_path": resources.mount_path,
        **{field: getattr(resources, field) for field in own},
    }


def _launch(options: Any, extra: Sequence[str], command_line: str, fill: Any, name: str, folder: Path) -> Launch:
    namespace = ["--namespace", options.resources.namespace] if options.resources.namespace else []

    def submit(manifest: Path) -> None:
        print(run_tool(["kubectl", "apply", *namespace, "-f", str(manifest)]))
        where = " ".join(["kubectl", *namespace])
        print(f"file: {manifest}\nlog: {where} logs -f job/{name}\nstop it: {where} delete -f {manifest}")

    configuration = {"command": command_line, "options": asdict(options), "options_after_dashes": list(extra)}
    return Launch("kubernetes", ".yaml", fill, folder, "kubectl", submit, configuration, snapshot=False)


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


def _check(options: KubernetesResources) -> None:
    if options.restarts < 0:
        raise ValueError(f"--restarts: {options.restarts} is negative; give 0 for none")
    duration_seconds("--time", options.time)
    if options.cpus_per_node is not None and options.cpus_per_node < 1:
        raise ValueError(f"--cpus-per-node: {options.cpus_per_node} is less than 1; give the cores a pod may use")
    for field in ("memory", "shared_memory"):
        value = getattr(options, field)
        if value is not None and not QUANTITY.fullmatch(value):
            raise ValueError(f"{option_name(field)}: {value!r} is no quantity of Kubernetes; write it like 16Gi")
    for field in ("volume_claim", "namespace", "secret"):
        value = getattr(options, field)
        if value is not None and not DNS_SUBDOMAIN.fullmatch(value):
            raise ValueError(f"{option_name(field)}: {value!r} is no Kubernetes name; lower case, digits and hyphens")
    if any(character.isspace() for character in options.image):
        raise ValueError(f"--image: {options.image!r} holds a blank; write it like registry.example/noisynn:1")
    if not PurePosixPath(options.mount_path).is_absolute() or ":" in options.mount_path:
        raise ValueError(f"--mount-path: {options.mount_path!r} must be an absolute path without a colon, like /data")


def _check_paths(train: training.TrainingOptions, resources: KubernetesResources) -> None:
    mount = PurePosixPath(resources.mount_path)
    for option, path in (("--run", train.run), ("--train", train.train), ("--val", train.val)):
        inside = mount in PurePosixPath(path).parents and ".." not in PurePosixPath(path).parts
        if not inside and not ("://" in path and option != "--run"):
            raise ValueError(f"{option}: {path} is not under --mount-path {mount}, so it would end with its pod")


def _launch_folder(options: KubernetesOptions) -> Path:
    if options.launch_folder is not None:
        return Path(options.launch_folder).expanduser().absolute()
    mount_path = options.resources.mount_path
    if options.training.submit and not Path(mount_path).is_dir():
        raise ValueError(
            f"--launch-folder: {mount_path} is not mounted on this machine; say where the filled file shall be written"
        )
    return Path(options.training.run) / "launch"
