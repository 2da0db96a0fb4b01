"""A reader of numbers instead of pictures, for tests of what comes when."""

from collections.abc import Iterator

import numpy as np
import torch

from pipeline.data.batch import Batch
from pipeline.data.loader import TrainLoader


class InMemory:
    """What readers without files have in common. Their workers are processes; none reads on threads."""

    fetches = False
    samples_sha256 = "in memory"
    threaded = False
    labels: np.ndarray

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return (len(self.labels),)

    def __len__(self) -> int:
        return len(self.labels)

    def labels_of(self, sample_ids: np.ndarray) -> np.ndarray:
        return self.labels[sample_ids]

    def expect(self, shards: np.ndarray, keep: bool) -> None:
        """Nothing is fetched."""

    def where(self, sample_id: int) -> str:
        return f"number {sample_id}"


class InMemoryPictures(InMemory):
    """Pictures (n, H, W, 3) for evaluation."""

    pixels: np.ndarray

    def batch(self, sample_ids: np.ndarray, epoch: int | None, in_hand=None) -> Batch:
        assert epoch is None, "evaluation takes the evaluation transform"
        pixels, labels = torch.from_numpy(self.pixels[sample_ids]), torch.from_numpy(self.labels[sample_ids])
        return Batch(pixels, labels, torch.as_tensor(sample_ids))


class Numbers(InMemory):
    """A reader without files; its pictures tell sample and epoch."""

    classes = ("even", "odd")
    shard_sizes: tuple[int, ...] = ()

    def __init__(self, n: int, shard_sizes: tuple[int, ...] | None = None) -> None:
        self.labels = np.arange(n, dtype=np.int64) % 2
        self.shard_sizes = shard_sizes or (n,)

    def batch(self, sample_ids: np.ndarray, epoch: int | None, in_hand=None) -> Batch:
        ids = torch.as_tensor(sample_ids)
        pictures = (ids + 100 * (epoch or 0)).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3)
        return Batch(pictures, torch.from_numpy(self.labels[sample_ids]), ids)


def same(one: Batch, other: Batch) -> bool:
    tensors = zip(one[:3], other[:3], strict=True)
    return all(a.dtype == b.dtype and a.equal(b) for a, b in tensors) and one.replaced == other.replaced


def stream(loader: TrainLoader) -> Iterator[Batch]:
    """Batches epoch after epoch, as the training loop takes them."""
    while True:
        yield from loader


def ids_of(batches: list[Batch]) -> list[list[int]]:
    return [batch.sample_ids.tolist() for batch in batches]
