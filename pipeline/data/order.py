"""Which sample comes when: pure functions of (seed, epoch, position), the same for any number of ranks.

One permutation an epoch over all samples, or over one window of shards after another. Step s of a global batch of G
takes positions sG to (s+1)G-1; a rank's part, and each micro-batch of it, is a contiguous slice. Training drops the
last n mod G samples of an epoch; evaluation none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    fitting = fitting_micro_batches(global_batch, micro_batch, world_size, multiple_of)
    return Layout(rank, world_size, fitting[-1], global_batch // world_size // fitting[-1])


def fitting_micro_batches(global_batch: int, at_most: int, world_size: int, multiple_of: int = 1) -> list[int]:
    """Micro-batches that a rank's share of the global batch can be cut into, ascending. Errors: as layout_of."""
    if at_most < 1 or global_batch < 1:
        raise ValueError(f"global_batch {global_batch} and micro_batch {at_most} must be at least 1")
    if global_batch % world_size:
        below = global_batch - global_batch % world_size
        near = [str(size) for size in (below, below + world_size) if size]
        counts = [count for count in range(1, global_batch + 1) if global_batch % count == 0]
        ranks = [max(count for count in counts if count < world_size), *(c for c in counts if c > world_size)][:2]
        raise ValueError(
            f"global_batch {global_batch} cannot be shared by {world_size} ranks: use {' or '.join(near)}, "
            f"or start {' or '.join(map(str, ranks))} ranks"
        )
    share = global_batch // world_size
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    fitting = [size for size in divisors if size <= at_most and size % multiple_of == 0]
    if not fitting:
        larger = [str(size) for size in divisors if size % multiple_of == 0][:1]
        groups = [str(size) for size in divisors if size <= at_most]
        raise ValueError(
            f"no micro_batch up to {at_most} divides the {share} samples of each rank and is a multiple of "
            f"{multiple_of} (noise.group_size, and mixup's pairs): sizes that do divide one: "
            f"{', '.join(groups)}{f'; or take a micro_batch of {larger[0]}' if larger else ''}"
        )
    return fitting


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Errors: ValueError where the global batch is larger than the epoch."""
    if num_samples < global_batch:
        raise ValueError(f"global_batch {global_batch} is larger than the epoch of {num_samples} samples: lower it")
    return num_samples // global_batch


def permutation(num_samples: int, seed: int, *keys: int) -> np.ndarray:
    """A shuffle of 0 to num_samples - 1 keyed by (seed, *keys), int32 where that holds them.

    RandomState, not Generator: numpy promises that its stream never changes (NEP 19), so a resumed run is in the same
    order whatever the version.
    """
    ids = np.arange(num_samples, dtype=np.int32 if num_samples <= 2**31 else np.int64)  # halves the cache misses
    np.random.RandomState([seed & 0xFFFFFFFF, *keys]).shuffle(ids)
    return ids


class Order:
    """The order of each epoch: position -> sample id, a pure function of (seed, epoch).

    Without a window one permutation of all samples. With a window of W shards, the shards are shuffled, and the samples
    of W shards after one another are: whoever reads position p needs no more than the W shards of its window. It is the
    same order for any number of ranks, all of which are in the same window at a step.
    """

    def __init__(self, num_samples: int, seed: int, shard_sizes: Sequence[int] = (), window: int = 0) -> None:
        """shard_sizes: samples of each shard in the manifest's order; needed for a window.

        Errors: ValueError for a window without shards.
        """
        self.num_samples = num_samples
        self.seed = seed
        self.sizes = np.asarray(shard_sizes, np.int64)
        # A window of all shards is the permutation of all samples, which has golden values to keep.
        self.window = 0 if window >= len(self.sizes) > 0 else window
        if self.window and self.sizes.sum() != num_samples:
            raise ValueError(f"data.window {window} needs shards, and they hold {self.sizes.sum()} of {num_samples}")
        self._first_ids = np.cumsum(self.sizes) - self.sizes
        self._held: tuple[int, int, np.ndarray] | None = None  # the last (epoch, window, its ids)

    def ids(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Sample ids at positions `start` to `stop` - 1 of an epoch, int64."""
        if not self.window:
            return self._window_ids(epoch, 0)[start:stop].astype(np.int64)
        ends = self._window_ends(epoch)
        parts = []
        while start < stop:
            window = int(np.searchsorted(ends, start, side="right"))
            first = int(ends[window - 1]) if window else 0
            until = min(stop, int(ends[window]))
            parts.append(self._window_ids(epoch, window)[start - first : until - first])
            start = until
        return np.concatenate([np.empty(0, np.int64), *parts])

    def shards(self, epoch: int, position: int) -> np.ndarray:
        """Shards that are needed at a position, and those of the window after it, in the order of their use.

        Without a window every shard is needed all the time.
        """
        if not self.window:
            return np.arange(len(self.sizes))
        window = int(np.searchsorted(self._window_ends(epoch), position, side="right"))
        coming = np.append(self._shard_order(epoch)[window * self.window :], self._shard_order(epoch + 1))
        _, first = np.unique(coming[: 2 * self.window], return_index=True)
        return coming[np.sort(first)]

    def _shard_order(self, epoch: int) -> np.ndarray:
        return permutation(len(self.sizes), self.seed, epoch)

    def _window_ends(self, epoch: int) -> np.ndarray:
        """Position after the last of each window."""
        ends = np.cumsum(self.sizes[self._shard_order(epoch)])
        return np.append(ends[self.window - 1 : -1 : self.window], ends[-1])

    def _window_ids(self, epoch: int, window: int) -> np.ndarray:
        """Sample ids of one window in their order; the last that was asked for is kept, since it is asked for again."""
        if self._held is None or self._held[:2] != (epoch, window):
            self._held = None  # not two at once
            self._held = epoch, window, self._shuffled(epoch, window)
        return self._held[2]

    def _shuffled(self, epoch: int, window: int) -> np.ndarray:
        if not self.window:
            return permutation(self.num_samples, self.seed, epoch)
        shards = self._shard_order(epoch)[window * self.window : (window + 1) * self.window]
        ids = np.concatenate([np.arange(self.sizes[s], dtype=np.int64) + self._first_ids[s] for s in shards])
        return ids[permutation(len(ids), self.seed, epoch, window)]


def training_micro_batches(order: Order, epoch: int, layout: Layout, start_step: int) -> Iterator[np.ndarray]:
    """This rank's micro-batches of an epoch, from `start_step` on: int64 (micro_batch,) each."""
    for step in range(start_step, steps_per_epoch(order.num_samples, layout.global_batch)):
        first = step * layout.global_batch + layout.rank * layout.micro_batch * layout.accumulation
        for i in range(layout.accumulation):
            yield order.ids(epoch, first + i * layout.micro_batch, first + (i + 1) * layout.micro_batch)


def class_order(labels: np.ndarray) -> np.ndarray:
    """Sample ids class by class, by id within a class: ImageFolder's order where ids follow the file names.

    Of shards that were shuffled they do not; see class_order.py.
    """
    return np.argsort(labels, kind="stable")


def shuffled_order(num_samples: int, seed: int) -> np.ndarray:
    return permutation(num_samples, seed, 0).astype(np.int64)


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
