"""Pure: which sample goes to which shard, and in what order. Nothing here touches a file."""

from __future__ import annotations

import random


def plan_shards(num_samples: int, samples_per_shard: int, seed: int, keep_order: bool = False) -> list[list[int]]:
    """Splits the indices 0 to num_samples-1 into shards; the concatenation of the shards is the sample-id order.

    Shuffled by `seed`, so that every shard mixes the classes, or in the source's order with `keep_order`. All shards
    but the last hold `samples_per_shard`.
    """
    order = list(range(num_samples))
    if not keep_order:
        # Of Python's random module only seeding by an int and the sequence of random() are promised to stay the same
        # for ever (shuffle() is not, nor are numpy Generator's streams), so the order is a sort by random().
        draw = random.Random(seed).random
        draws = [draw() for _ in order]
        order.sort(key=draws.__getitem__)
    return [order[start : start + samples_per_shard] for start in range(0, num_samples, samples_per_shard)]


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"
