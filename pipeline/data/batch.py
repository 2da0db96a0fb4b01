"""What every reader hands on, and what every reader is."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


class Replaced(NamedTuple):
    """A sample that could not be read, and the one that stands in its place."""

    sample_id: int
    by: int
    reason: str


class Batch(NamedTuple):
    images: Tensor  # uint8 (B, H, W, 3)
    labels: Tensor  # int64 (B,)
    sample_ids: Tensor  # int64 (B,), of the pictures that are really here
    replaced: tuple[Replaced, ...] = ()  # only where data.on_bad_sample is `replace`


class Reader(Protocol):
    """Random access to one split. The sample id is the index in the manifest's order."""

    classes: tuple[str, ...]  # after the label map
    shard_sizes: tuple[int, ...]  # samples of each shard, in the manifest's order; empty where there are none
    fetches: bool  # whether shards come from a store
    samples_sha256: str  # of the samples, their order and their labels
    threaded: bool  # whether threads can read without waiting for one another's Python

    def __len__(self) -> int:
        """Samples."""
        ...

    def labels_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """int64 (B,), after the label map."""
        ...

    def batch(self, sample_ids: np.ndarray, epoch: int | None, in_hand: np.ndarray | None = None) -> Batch:
        """Reads and augments; `epoch=None` applies the evaluation transform. May be called by several threads.

        in_hand, int64 (1,): given in a worker process, which notes there the sample that it is at.
        """
        ...

    def where(self, sample_id: int) -> str:
        """What messages call a sample."""
        ...

    def expect(self, shards: np.ndarray, keep: bool) -> None:
        """Says which shards are needed from now on, in the order in which they are; others may be let go.

        keep: they fit into a cache together, and stay there until they are let go.
        """
        ...
