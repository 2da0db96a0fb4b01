"""Ranks, Accelerate, DeepSpeed and the launch environment: the one place that knows of them."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from pipeline.data.order import Layout

_LAUNCHER = "NOISYNN_LAUNCHER_PID"
_STRAGGLER_SECONDS = 5.0  # that a rank lives on after another has ended
_SAVING_SECONDS = 600  # that ranks have to save after a signal; one that hangs is ended by its own watchdog
LOSS_SCALE_WINDOW = 2000  # steps without an overflow before the loss scale is doubled


Strategy = Literal["ddp", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread. Under torchrun its variables decide the number of ranks."""

    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3"] = "auto"
    """zero1 shares the optimiser's state among the ranks, zero2 the gradients too, zero3 the weights too; auto takes
    the first that fits comfortably into a device's memory."""
    offload: bool = False
    """Keep master weights and optimiser state in the host's memory (zero1 to zero3, with GPUs)."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the arithmetic; weights, their average and the optimiser's state are always kept in float32."""
    compile: bool = False
    """torch.compile the model."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping what it computed."""
    processes: int = 1
    """Ranks that the command itself starts on this machine; torchrun's own count wins."""
    timeout_seconds: float = 600.0
    """A collective that takes longer ends the run."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"parallel.processes is {self.processes}: at least 1")
        if not 0 < self.timeout_seconds < 10**7:  # the limit of what torch can count in nanoseconds is far above
            raise ValueError(f"parallel.timeout_seconds is {self.timeout_seconds}: above 0 and finite")
        if self.offload and self.strategy == "ddp":
            raise ValueError("parallel.offload needs zero1, zero2 or zero3: ddp keeps all state on the device")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The 16-bit format of the arithmetic, None for fp32."""
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


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

    torchrun itself would turn every failure into status 1 and add a traceback of its own. SIGTERM and SIGUSR1 are
    handed to the ranks, which save and end.
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
        shutdown_timeout=_SAVING_SECONDS,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    ended: set[int] = set()
    threading.Thread(target=_end_stragglers, args=(processes, ended), name="stragglers", daemon=True).start()
    try:
        # The agent fills ${local_rank} into arguments and makes $ of $$, so each dollar is doubled.
        words = (word.replace("$", "$$") for word in arguments)
        elastic_launch(config, entrypoint=sys.executable)("-m", "pipeline", *words)
    except ChildFailedError as error:
        return _explain({rank: f.exitcode for rank, f in error.failures.items() if f.pid not in ended})
    except SignalException as stop:
        return _stopped(stop.sigval)
    return 0


def _end_stragglers(processes: int, ended: set[int]) -> None:
    """Ranks end together, or because one of them died. The agent would give a stopped one as long as one that saves.

    ended: is given the ids of processes that were.
    """
    import psutil  # not in the smallest environment, where nothing is launched

    agent, all_started, since = psutil.Process(), False, None
    while True:
        time.sleep(0.5)
        living = [child for child in agent.children() if child.status() != psutil.STATUS_ZOMBIE]
        all_started = all_started or len(living) >= processes
        since = (since or time.monotonic()) if all_started and len(living) < processes else None
        if since is not None and time.monotonic() - since > _STRAGGLER_SECONDS:
            for child in living:
                ended.add(child.pid)
                child.kill()


def _stopped(by: signal.Signals) -> int:
    print(f"stopped by {by.name}: the same command goes on from the newest checkpoint", file=sys.stderr)
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


def is_timeout(error: BaseException) -> bool:
    """Whether this is gloo's or NCCL's word for a collective that took longer than its time limit."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("Timed out waiting", "timed out"))


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


def join_ranks(ranks: Ranks, timeout_seconds: float = 600.0) -> torch.device:
    """This rank's device; under torchrun joins the process group, over NCCL or, without a GPU, gloo.

    timeout_seconds: of every collective, in which a rank that died shows.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if ranks.launched and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_seconds))
    return device


def barrier(ranks: Ranks) -> None:
    """Waits for all ranks."""
    if ranks.world_size > 1:
        dist.barrier()


def leave(status: int) -> None:
    """Ends a rank at once, after its work is done and on disk.

    DeepSpeed's and gloo's threads sometimes abort the interpreter while it shuts down (seen in 3 of 16 small runs),
    which would report a finished run as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def deepspeed_config(
    config: ParallelConfig, stage: int, layout: Layout, clip_grad_norm: float | None, num_elements: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from the project's own; numbers only, since `auto` needs a prepared loader.

    num_elements: of all parameters. Buckets are no larger: DeepSpeed allocates one each step, of 2 GB by default.
    """
    on_gpu = torch.cuda.is_available()
    bucket = min(num_elements, 50_000_000)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": on_gpu,  # a second stream, which a CPU does not have
        # A copy of all gradients, against the fragmentation of a GPU's memory: 15 % of a small ViT's step on a CPU.
        "contiguous_gradients": on_gpu,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,  # must be even
    }
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "train_batch_size": layout.global_batch,
        "gradient_clipping": clip_grad_norm or 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        # The rule of torch's GradScaler: down at each overflow, up after 2,000 steps without one.
        "fp16": {"enabled": config.precision == "fp16", "hysteresis": 1, "loss_scale_window": LOSS_SCALE_WINDOW},
        # In 16 bits a sum of micro-batches loses what the later ones add. Stage 1 sums in the arithmetic's precision:
        # DeepSpeed has another optimizer for the rest there, which holds three times the gradients.
        "data_types": {"grad_accum_dtype": "fp32" if stage > 1 and layout.accumulation > 1 else None},
        "zero_allow_untested_optimizer": True,  # timm's AdamW and SGD work by element, so flattening does no harm
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be another arithmetic
        "steps_per_print": 2**31 - 1,
    }


def build_accelerator(
    config: ParallelConfig, strategy: Strategy, layout: Layout, clip_grad_norm: float | None, num_elements: int
):
    """Accelerate over NCCL, or gloo without a GPU. Asserts that as many ranks joined as were launched.

    It spreads the model and nothing else: under ddp the engine does autocast and loss scaling itself, since Accelerate
    has no float16 without a GPU.
    """
    quiet_libraries()
    on_gpu = torch.cuda.is_available()
    # Without these two DeepSpeed looks for a GPU, or Accelerate leaves it out in silence.
    if strategy != "ddp":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        if not on_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
            from deepspeed.ops import __compatible_ops__

            # Serves inference alone, but is compiled at the start, under a lock that a killed run leaves behind.
            __compatible_ops__["deepspeed_shm_comm"] = False
        # Three functions of its Muon are compiled at import, which brings in all of inductor: 3 s of each start.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        import deepspeed.runtime.zero.utils

        del os.environ["TORCHDYNAMO_DISABLE"]
        # It warns of every optimiser but its own, and of each skipped step, which the trainer counts.
        deepspeed.utils.logger.setLevel(logging.ERROR)
    from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs
    from accelerate.utils import InitProcessGroupKwargs

    plugin = None
    if strategy != "ddp":
        settings = deepspeed_config(config, int(strategy[-1]), layout, clip_grad_norm, num_elements)
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
    # The gradients lie in the buckets that are reduced: 4 bytes an element less, and no copy.
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if ranks_from_environment().launched:
        # Without a backend named, every rank on a CPU believes itself rank 0 of 1 and trains alone.
        timeout = timedelta(seconds=config.timeout_seconds)
        handlers.append(InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo", timeout=timeout))
    accelerator = Accelerator(
        deepspeed_plugin=plugin,
        cpu=not on_gpu and strategy == "ddp",  # with DeepSpeed, cpu=True would put DDP in its place
        mixed_precision="no" if strategy == "ddp" or config.precision == "fp32" else config.precision,
        gradient_accumulation_steps=layout.accumulation,
        kwargs_handlers=handlers,
    )
    if (accelerator.process_index, accelerator.num_processes) != (layout.rank, layout.world_size):
        raise RuntimeError(
            f"launched as rank {layout.rank} of {layout.world_size}, but the process group says "
            f"{accelerator.process_index} of {accelerator.num_processes}: ranks would train alone"
        )
    return accelerator


def assert_engine(prepared_model: Any, strategy: Strategy, world_size: int) -> None:
    """Errors: RuntimeError where the engine that was asked for is not the one that runs."""
    found = type(prepared_model).__name__
    expected = "DistributedDataParallel" if strategy == "ddp" else "DeepSpeedEngine"
    if strategy == "ddp" and world_size == 1:
        return  # Accelerate leaves a lone model unwrapped
    if found != expected:
        raise RuntimeError(f"parallel.strategy is {strategy}, but the model was wrapped by {found}")
    if strategy != "ddp" and prepared_model.zero_optimization_stage() != int(strategy[-1]):
        stage = prepared_model.zero_optimization_stage()
        raise RuntimeError(f"parallel.strategy is {strategy}, but DeepSpeed runs stage {stage}")


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

    if told := os.environ.get("NOISYNN_COMMIT"):  # a launched job runs a copy of the code, outside any repository
        return told
    here = Path(__file__).parent
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return answer.stdout.strip() or "unknown"
