"""Pure: which sample goes to which shard, in what order, and which task writes it. Nothing here touches a file."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np


def plan_shards(
    num_samples: int,
    samples_per_shard: int,
    seed: int,
    keep_order: bool = False,
    runs: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Splits the indices 0 to num_samples-1 into shards; the concatenation of the shards is the sample-id order.

    Shuffled by `seed`, so that every shard mixes the classes, or in the source's order with `keep_order`. All shards
    but the last hold `samples_per_shard`. Where the source reads samples in runs (of these lengths) only, the runs are
    shuffled, and then the samples inside each shard: a shard meets as few runs as it can, else each of a Parquet file's
    row groups would be read once for nearly every shard.
    """
    draw = random.Random(seed).random
    if keep_order:
        order = np.arange(num_samples)
    elif runs is None:
        order = _shuffled(num_samples, draw)
    else:
        starts = np.concatenate([[0], np.cumsum(runs)])
        order = np.concatenate([np.arange(starts[run], starts[run + 1]) for run in _shuffled(len(runs), draw)])
    assert len(order) == num_samples
    shards = [order[start : start + samples_per_shard] for start in range(0, num_samples, samples_per_shard)]
    if runs is None or keep_order:
        return shards
    return [shard[_shuffled(len(shard), draw)] for shard in shards]


def _shuffled(count: int, draw) -> np.ndarray:
    # Of Python's random module only seeding by an int and the sequence of random() are promised to stay the same for
    # ever (shuffle() is not, nor are numpy Generator's streams), so the order is a sort by random().
    return np.argsort(np.array([draw() for _ in range(count)]), kind="stable")


def task_of(shard: int, num_tasks: int) -> int:
    """The task that writes a shard: dealt out in turn, so that tasks differ by one shard at most."""
    return shard % num_tasks


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"
