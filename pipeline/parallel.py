"""Ranks, Accelerate, DeepSpeed and the launch environment: the one place that knows of them."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from pipeline.data.order import Layout

_LAUNCHER = "NOISYNN_LAUNCHER_PID"


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread. Under torchrun its variables decide the number of ranks."""

    engine: Literal["deepspeed", "ddp"] = "deepspeed"
    zero_stage: Literal[0, 1, 2] = 1
    """DeepSpeed only: 1 shards the optimiser's state over ranks, 2 the gradients too."""
    precision: Literal["fp32", "bf16"] = "bf16"
    processes: int = 1
    """Ranks that the command itself starts on this machine; torchrun's own count wins."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"parallel.processes is {self.processes}: at least 1")


@dataclass(frozen=True)
class Ranks:
    """This process among all, by torchrun's variables; (0, 1) where nothing launched it."""

    rank: int
    world_size: int
    launched: bool


def ranks_from_environment(environment: dict[str, str] | os._Environ = os.environ) -> Ranks:
    if "RANK" not in environment:
        return Ranks(0, 1, launched=False)
    return Ranks(int(environment["RANK"]), int(environment["WORLD_SIZE"]), launched=True)


def check_devices(processes: int) -> None:
    """Errors: ValueError where there are GPUs, but fewer than ranks to start."""
    devices = torch.cuda.device_count()
    if devices and processes > devices:
        raise ValueError(
            f"parallel.processes is {processes}, but this machine has {devices} GPUs: start at most {devices}"
        )


def launch(arguments: list[str], processes: int) -> int:
    """Runs `python -m pipeline <arguments>` in so many ranks on this machine, as torchrun does; returns an exit status.

    torchrun itself would turn every failure into status 1 and add a traceback of its own.
    """
    os.environ[_LAUNCHER] = str(os.getpid())
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):  # the agent's own words; what a rank says stays
            logging.getLogger(name).setLevel(logging.CRITICAL)
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"pipeline-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        # The agent fills ${local_rank} into arguments and makes $ of $$, so each dollar is doubled.
        words = (word.replace("$", "$$") for word in arguments)
        elastic_launch(config, entrypoint=sys.executable)("-m", "pipeline", *words)
    except ChildFailedError as error:
        return _explain({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as stop:
        return _stopped(stop.sigval)
    return 0


def _stopped(by: signal.Signals) -> int:
    print(f"stopped by {by.name}: the same command with --resume goes on", file=sys.stderr)
    return 128 + by


def _explain(statuses: dict[int, int]) -> int:
    """The status that says why: of a rank that was killed, else of one that refused its input, else any other's.

    A rank whose peer died ends with 1, sometimes before the agent sees the peer; SIGTERM is the agent's own.
    """

    def cause(rank: int) -> int:
        status = statuses[rank]
        return 0 if status < 0 and status != -signal.SIGTERM else 1 if status == 2 else 2 if status > 0 else 3

    rank = min(statuses, key=cause)
    if (status := statuses[rank]) >= 0:
        return status
    by = signal.Signals(-status)
    if by in (signal.SIGINT, signal.SIGTERM):
        return _stopped(by)
    print(f"error: rank {rank} was ended by {by.name}", file=sys.stderr)
    return 128 + by


def is_lost_peer(error: BaseException) -> bool:
    """Whether this is gloo's or NCCL's word for another rank that died."""
    words = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in words)


def launched_here(environment: dict[str, str] | os._Environ = os.environ) -> bool:
    """Whether `launch` started this rank, after checking the configuration."""
    return _LAUNCHER in environment


def guard_rank() -> None:
    """Ctrl-C ends a rank at once and without a word, its launcher speaks; and no rank outlives a killed launcher."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if launched_here():
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != int(os.environ[_LAUNCHER]):
            raise RuntimeError("the process that started this rank is gone")


def join_ranks(ranks: Ranks) -> torch.device:
    """This rank's device; under torchrun joins the process group, over NCCL or, without a GPU, gloo."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if ranks.launched and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    return device


def leave(status: int) -> None:
    """Ends a rank at once, after its work is done and on disk.

    DeepSpeed's and gloo's threads sometimes abort the interpreter while it shuts down (seen in 3 of 16 small runs),
    which would report a finished run as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def deepspeed_config(config: ParallelConfig, layout: Layout, clip_grad_norm: float | None) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from the project's own; numbers only, since `auto` needs a prepared loader."""
    return {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "train_batch_size": layout.global_batch,
        "gradient_clipping": clip_grad_norm or 0.0,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_allow_untested_optimizer": True,  # timm's AdamW and SGD work by element, so flattening does no harm
        "steps_per_print": 2**31 - 1,
    }


def build_accelerator(config: ParallelConfig, layout: Layout, clip_grad_norm: float | None):
    """Accelerate over NCCL, or gloo without a GPU. Asserts that as many ranks joined as were launched."""
    quiet_libraries()
    on_gpu = torch.cuda.is_available()
    # Without these two DeepSpeed looks for a GPU, or Accelerate leaves it out in silence.
    if config.engine == "deepspeed":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        if not on_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
            from deepspeed.ops import __compatible_ops__

            # Serves inference alone, but is compiled at the start, under a lock that a killed run leaves behind.
            __compatible_ops__["deepspeed_shm_comm"] = False
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs

    plugin = None
    if config.engine == "deepspeed":
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, layout, clip_grad_norm))
    accelerator = Accelerator(
        deepspeed_plugin=plugin,
        cpu=not on_gpu and config.engine == "ddp",  # with DeepSpeed, cpu=True would put DDP in its place
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        gradient_accumulation_steps=layout.accumulation,
        # Without a backend named, every rank on a CPU believes itself rank 0 of 1 and trains alone.
        kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo")],
    )
    if (accelerator.process_index, accelerator.num_processes) != (layout.rank, layout.world_size):
        raise RuntimeError(
            f"launched as rank {layout.rank} of {layout.world_size}, but the process group says "
            f"{accelerator.process_index} of {accelerator.num_processes}: ranks would train alone"
        )
    return accelerator


def require_same_on_all_ranks(digests: dict[str, str], ranks: Ranks) -> None:
    """Compares digests of what each rank has opened, by options: a node may have a copy of its own.

    Errors: ValueError, on all ranks, naming the option and the rank that has other data.
    """
    if ranks.world_size == 1:
        return
    everyone: list[dict[str, str]] = [{} for _ in range(ranks.world_size)]
    dist.all_gather_object(everyone, digests)
    for name, first in everyone[0].items():
        for rank, own in enumerate(everyone):
            if own[name] != first:
                raise ValueError(
                    f"rank {rank} has other samples or labels in {name} than rank 0: give all nodes the same files"
                )


def assert_engine(prepared_model: Any, config: ParallelConfig, world_size: int) -> None:
    """Errors: RuntimeError where the engine that was asked for is not the one that runs."""
    expected = {"deepspeed": "DeepSpeedEngine", "ddp": "DistributedDataParallel"}[config.engine]
    if config.engine == "ddp" and world_size == 1:
        return  # Accelerate leaves a lone model unwrapped
    if (found := type(prepared_model).__name__) != expected:
        raise RuntimeError(f"parallel.engine is {config.engine}, but the model was wrapped by {found}")


def quiet_libraries() -> None:
    """DeepSpeed and Accelerate log every step of their start on every rank; warnings and errors stay."""
    import warnings

    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("DeepSpeed", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # DeepSpeed asks for the CUDA toolkit on every rank, and torch warns where there is one but no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def snapshot_environment() -> dict[str, str]:
    """Versions that a result depends on."""
    import importlib.metadata as metadata
    import platform

    names = ("torch", "timm", "accelerate", "deepspeed", "webdataset", "ffcv", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({len(os.sched_getaffinity(0))} cores)"
    )
    return found | {"python": platform.python_version(), "device": device, "commit": _commit()}


def _commit() -> str:
    import subprocess

    here = Path(__file__).parent
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return answer.stdout.strip() or "unknown"
