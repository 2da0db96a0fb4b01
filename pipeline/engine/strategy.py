"""How a training state is spread over ranks, chosen by arithmetic on its size and a device's memory."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from pipeline.parallel import ParallelConfig, Strategy

COMFORTABLE = 0.5  # of a device's memory for the state: activations, buckets and the allocator's gaps take the rest
_FLOAT32 = 4

# By class, whose arithmetic is what matters: ZeRO flattens tensors, which those that need a tensor's shape do not bear.
_STATE_PER_ELEMENT = {"AdamW": 2, "Adam": 2, "AdamWLegacy": 2, "SGD": 1}
_PER_TENSOR = {"Lamb": 2, "Muon": 2}  # Muon's fallback is Adam's


class StateSize(NamedTuple):
    """What the state's bytes depend on."""

    elements: int  # trainable
    world_size: int
    half: bool  # bf16 or fp16
    state_per_element: int  # float32 numbers that the optimiser keeps
    ema: bool
    offload: bool


def bytes_on_device(strategy: Strategy, size: StateSize) -> int:
    """Weights, gradients, optimiser state and average on each device; no activations.

    ddp keeps float32 weights and gradients, under autocast a 16-bit copy of the weights too. ZeRO keeps a float32 copy
    of the weights besides those that the model runs with, shared out; what each stage shares out: arXiv 1910.02054.
    """
    low = 2 if size.half else _FLOAT32
    shared_average = _FLOAT32 * size.ema / size.world_size
    optimizer = _FLOAT32 * size.state_per_element
    if strategy == "ddp":
        copy = low if size.half else 0
        return round(size.elements * (_FLOAT32 + _FLOAT32 + copy + optimizer + shared_average))
    weights = low / size.world_size if strategy == "zero3" else low
    gradients = low if strategy == "zero1" else low / size.world_size
    masters = 0.0 if size.offload else (_FLOAT32 + optimizer) / size.world_size + shared_average
    return round(size.elements * (weights + gradients + masters))


def choose_strategy(size: StateSize, memory_bytes: int, by_element: bool = True) -> tuple[Strategy, str]:
    """The first of ddp, zero1, zero2, zero3 whose state fits comfortably, and one sentence why.

    memory_bytes: of one device. by_element: whether the optimiser works by element; ZeRO needs that.
    """
    limit = COMFORTABLE * memory_bytes
    candidates: tuple[Strategy, ...] = (
        ("zero1", "zero2", "zero3") if size.offload else ("ddp", "zero1", "zero2", "zero3")
    )
    if not by_element or (size.world_size == 1 and not size.offload):
        candidates = ("ddp",)
    needs = {strategy: bytes_on_device(strategy, size) for strategy in candidates}
    chosen = next((strategy for strategy in candidates if needs[strategy] <= limit), candidates[-1])
    where = f"of {_gb(memory_bytes)} on each of {size.world_size} devices"
    text = f"strategy {chosen}: the state takes {_gb(needs[chosen])} {where}"
    before = candidates[: candidates.index(chosen)]
    if needs[chosen] > limit:
        text += f", more than the {_gb(limit)} that would be comfortable, and "
        only = "ZeRO cannot run this optimizer" if not by_element else "there is no other rank to share it with"
        more = "nothing shares out more" if size.offload else "nothing but --parallel.offload takes more off it"
        text += only if candidates == ("ddp",) else more
    elif before:
        text += f"; {', '.join(f'{name} would take {_gb(needs[name])}' for name in before)}, over {_gb(limit)}"
    return chosen, text


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"


def check_optimizer(optimizer: Optimizer, config: ParallelConfig) -> None:
    """Errors: ValueError for an optimiser whose state cannot be checkpointed, or not be shared out."""
    kind = type(optimizer).__name__
    if kind not in _STATE_PER_ELEMENT | _PER_TENSOR:
        known = ", ".join(sorted(_STATE_PER_ELEMENT | _PER_TENSOR))
        raise ValueError(f"optim.optimizer: the state of {kind} cannot be checkpointed; known are {known}")
    if kind in _PER_TENSOR and (config.strategy.startswith("zero") or config.offload):
        asked = "parallel.offload" if config.offload else f"parallel.strategy {config.strategy}"
        raise ValueError(
            f"optim.optimizer: {kind} needs each tensor whole, and {asked} flattens them: "
            "use --parallel.strategy ddp without offload, or adamw"
        )


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def check_strategy(strategy: Strategy, model: nn.Module, config: ParallelConfig) -> None:
    """Errors: ValueError for what ZeRO, or DeepSpeed without a GPU, cannot do."""
    if strategy == "ddp":
        return
    if strategy == "zero3" and config.compile:
        raise ValueError("parallel.compile and zero3, which fetches weights by hooks, do not go together: use zero2")
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError(f"parallel.precision fp16: DeepSpeed has none without a GPU ({strategy}): use bf16 or fp32")
    # Its running averages stay in float32, and torch takes no weights of another format beside them.
    if config.precision != "fp32" and has_batch_norm(model):
        raise ValueError(f"parallel.precision {config.precision} with {strategy}: not for BatchNorm; use ddp, or fp32")


def resolve_strategy(
    optimizer: Optimizer, elements: int, config: ParallelConfig, world_size: int, ema: bool, device: torch.device
) -> tuple[Strategy, str | None]:
    """The strategy to run and, where `auto` chose it, why. The same on all ranks: the smallest device decides.

    elements: trainable.
    """
    if config.strategy != "auto":
        return config.strategy, None
    kind = type(optimizer).__name__
    state = (_STATE_PER_ELEMENT | _PER_TENSOR)[kind]
    size = StateSize(elements, world_size, config.precision != "fp32", state, ema, config.offload)
    return choose_strategy(size, smallest_memory(device, world_size), by_element=kind in _STATE_PER_ELEMENT)


def smallest_memory(device: torch.device, world_size: int) -> int:
    """Bytes of the smallest device of all ranks; without GPUs a rank's share of its machine's memory."""
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device).total_memory
    else:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        own = machine // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    smallest = torch.tensor(own, dtype=torch.int64, device=device)
    if world_size > 1:
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)
