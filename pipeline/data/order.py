"""Which sample comes when: pure functions of (seed, epoch, position), the same for any number of ranks.

One permutation an epoch over all samples. Step s of a global batch of G takes positions sG to (s+1)G-1; a rank's part,
and each micro-batch of it, is a contiguous slice. Training drops the last n mod G samples of an epoch; evaluation none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """How a global batch is spread. Global batch = micro_batch x accumulation x world size."""

    rank: int
    world_size: int
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size


def layout_of(global_batch: int, micro_batch: int, rank: int, world_size: int, multiple_of: int = 1) -> Layout:
    """Spreads the global batch: the largest micro-batch up to `micro_batch` that divides a rank's share of it.

    `multiple_of`: what may not be split over two micro-batches.
    Errors: ValueError where there is none, naming what would do.
    """
    if micro_batch < 1 or global_batch < 1:
        raise ValueError(f"global_batch {global_batch} and micro_batch {micro_batch} must be at least 1")
    if global_batch % world_size:
        below = global_batch - global_batch % world_size
        near = [str(size) for size in (below, below + world_size) if size]
        raise ValueError(
            f"global_batch {global_batch} cannot be shared by {world_size} ranks: use {' or '.join(near)}, "
            "or another number of ranks"
        )
    share = global_batch // world_size
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    fitting = [size for size in divisors if size <= micro_batch and size % multiple_of == 0]
    if not fitting:
        larger = [str(size) for size in divisors if size % multiple_of == 0][:1]
        groups = [str(size) for size in divisors if size <= micro_batch]
        raise ValueError(
            f"no micro_batch up to {micro_batch} divides the {share} samples of each rank and is a multiple of "
            f"{multiple_of} (noise.group_size, and mixup's pairs): sizes that do divide one: "
            f"{', '.join(groups)}{f'; or take a micro_batch of {larger[0]}' if larger else ''}"
        )
    return Layout(rank, world_size, fitting[-1], share // fitting[-1])


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Errors: ValueError where the global batch is larger than the epoch."""
    if num_samples < global_batch:
        raise ValueError(f"global_batch {global_batch} is larger than the epoch of {num_samples} samples: lower it")
    return num_samples // global_batch


def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Sample ids of one epoch, int64 (num_samples,).

    RandomState, not Generator: numpy promises that its stream never changes (NEP 19), so a resumed run is in the same
    order whatever the version.
    """
    return np.random.RandomState([seed & 0xFFFFFFFF, epoch]).permutation(num_samples)


def training_micro_batches(
    num_samples: int, seed: int, epoch: int, layout: Layout, start_step: int
) -> Iterator[np.ndarray]:
    """This rank's micro-batches of an epoch, from `start_step` on: int64 (micro_batch,) each."""
    order = permutation(num_samples, seed, epoch)
    for step in range(start_step, steps_per_epoch(num_samples, layout.global_batch)):
        first = step * layout.global_batch + layout.rank * layout.micro_batch * layout.accumulation
        for i in range(layout.accumulation):
            yield order[first + i * layout.micro_batch : first + (i + 1) * layout.micro_batch]


def class_order(labels: np.ndarray) -> np.ndarray:
    """Sample ids class by class, by id within a class: ImageFolder's order, whatever the shards' order."""
    return np.argsort(labels, kind="stable")


def shuffled_order(num_samples: int, seed: int) -> np.ndarray:
    return permutation(num_samples, seed, epoch=0)


def evaluation_batches(order: np.ndarray, batch: int, group: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """This rank's share of a pass over `order`: every sample once over all ranks, groups of `group` never split.

    Batches hold whole groups; the last of all may be smaller.
    """
    groups = -(-len(order) // group)
    first, last = groups * rank // world_size, groups * (rank + 1) // world_size
    share = order[first * group : last * group]
    step = max(1, batch // group) * group
    for start in range(0, len(share), step):
        yield share[start : start + step]


def class_mate_share(labels: np.ndarray, group: int) -> float:
    """Mean share of a sample's group mates that are of its class; labels int (n,) in evaluation order.

    A sample that is alone in its group has no mates and does not count. NaN where no sample has any.
    """
    shares = []
    for start in range(0, len(labels), group):
        part = labels[start : start + group]
        if len(part) > 1:
            same = (part[:, None] == part[None, :]).sum(1) - 1
            shares.append(same / (len(part) - 1))
    return float(np.concatenate(shares).mean()) if shares else float("nan")
