"""What the plan of an epoch costs one rank of many, at the size of ImageNet."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.harness import Contestant
from benchmarks.loader_contestants import SEED
from benchmarks.memory import MemoryRow
from pipeline.data.order import Layout, Order, steps_per_epoch, training_micro_batches

IMAGENET, PER_SHARD = 1_281_167, 1000
RANKS, MICRO_BATCH = 512, 8
WINDOW = 16  # shards


class _Case(NamedTuple):
    name: str
    window: int
    share: float  # of the epoch that is done


_CASES = tuple(
    _Case(f"{order}, {name}", window, share)
    for order, window in (("all", 0), ("window", WINDOW))
    for name, share in (("start", 0.0), ("1 %", 0.01), ("99 %", 0.99))
)


def plan_contestants() -> list[Contestant]:
    """A round makes the order anew and asks for the first micro-batch of the last rank."""
    return [Contestant(case.name, partial(_plan, case), _settings(case)) for case in _CASES]


def plan_memory() -> list[MemoryRow]:
    return [
        MemoryRow("loader", "memory of a plan", case.name, _settings(case), _peak_bytes(partial(_plan, case)), 0, 1)
        for case in _CASES
    ]


def _settings(case: _Case) -> str:
    order = f"windows of {case.window} shards" if case.window else "one permutation of all samples"
    return f"{IMAGENET:,} samples, {RANKS} ranks, {order}, from {case.share:.0%} of the epoch on"


def _plan(case: _Case) -> int:
    sizes = [min(PER_SHARD, IMAGENET - first) for first in range(0, IMAGENET, PER_SHARD)]
    order = Order(IMAGENET, SEED, sizes, case.window)
    layout = Layout(rank=RANKS - 1, world_size=RANKS, micro_batch=MICRO_BATCH, accumulation=1)
    step = int(case.share * steps_per_epoch(IMAGENET, layout.global_batch))
    order.shards(0, step * layout.global_batch)
    ids = next(training_micro_batches(order, 0, layout, step))
    assert len(ids) == MICRO_BATCH
    return 1


def _peak_bytes(work: Callable[[], object]) -> int:
    """Of Python's and numpy's allocations."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
