"""The largest micro-batch that fits into memory, found by trying: from an out-of-memory error downwards."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist

from pipeline.build import build_model, open_data, smallest_micro_batch
from pipeline.config import TrainConfig
from pipeline.data.order import fitting_micro_batches
from pipeline.noise.drop_path import DropPathKeys
from pipeline.parallel import Ranks, join_ranks

_LARGEST = 4096  # pictures: more fill no device better
_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Unable to allocate",
)  # a GPU's, and a CPU's


def with_micro_batch(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The configuration with a number for `auto`; all ranks call this together.

    Errors: ValueError where not even the smallest that divides the global batch fits.
    """
    if config.micro_batch != "auto":
        return config
    sizes = fitting_micro_batches(config.global_batch, _LARGEST, ranks.world_size, smallest_micro_batch(config))
    size = largest_that_fits(sizes, _attempt(config, ranks), ranks)
    if ranks.rank == 0:
        print(f"micro_batch auto: {size} pictures fit on each rank", flush=True)
    return replace(config, micro_batch=size)


def largest_that_fits(sizes: list[int], attempt: Callable[[int], None], ranks: Ranks) -> int:
    """The first of `sizes`, tried from the largest, at which no rank runs out of memory."""
    for size in sorted(sizes, reverse=True):
        fits = torch.tensor(int(_fits(size, attempt)), device=join_ranks(ranks))
        if ranks.world_size > 1:
            dist.all_reduce(fits, dist.ReduceOp.MIN)
        if fits.item():
            return size
    raise ValueError(
        f"micro_batch auto: not even {min(sizes)} pictures fit into memory: take parallel.strategy zero3, "
        "parallel.activation_checkpointing, or more ranks"
    )


def _fits(size: int, attempt: Callable[[int], None]) -> bool:
    try:
        attempt(size)
    except (RuntimeError, MemoryError) as error:
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        return False
    finally:
        gc.collect()  # the failed attempt's tensors hang on the error's frames
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True


def _attempt(config: TrainConfig, ranks: Ranks) -> Callable[[int], None]:
    """A forward and backward pass of random pictures, beside as much memory as optimiser and average will take."""
    device = join_ranks(ranks)
    reader = open_data(config)[0]
    model, injector = build_model(config, reader, starting=False)
    model.to(device).train()
    if config.parallel.activation_checkpointing:
        cast(Any, model).set_grad_checkpointing(True)
    drop_path = DropPathKeys(model, config.seed)
    size = config.data.image_size
    # Of float32 an element: two of the optimiser, an average, and under ZeRO masters, which are shared.
    sharers = ranks.world_size if config.parallel.strategy.startswith("zero") else 1
    states = (2 + (config.optim.ema_decay is not None) + (sharers > 1)) / sharers
    parameters = sum(p.numel() for p in model.parameters())

    def attempt(batch: int) -> None:
        held = torch.empty(round(states * parameters), dtype=torch.float32, device=device)
        ids = torch.arange(batch, device=device)
        injector.set_batch(ids, 0)
        drop_path.set_batch(ids, 0)
        dtype = config.parallel.autocast_dtype
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(torch.randn(batch, 3, size, size, device=device)).float().logsumexp(1).mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
        del held

    return attempt
