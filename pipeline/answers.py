"""What a model answered to each picture: all that is counted is counted of it, whatever the ranks and batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# How far the margin of the first two logits moves with the batch, the order or the threads in float32, relative to the
# largest logit: measured, not proven. On a CPU, in batches of 1 to 300, ViTs (6 blocks at 32 pixels, Tiny and Small at
# 224) and ResNets (10, 18 and 50) of random weights moved by 2^-19.6 at most. The worst found is a ResNet-10 whose head
# was fitted to nearly equal features, so that large terms cancel: 2^-14.4. 16-bit arithmetic and TF32 keep no bound.
ROUNDING = 2.0**-13
CALIBRATION_BINS = 15  # of equal width, as Guo et al. 2017


@dataclass(frozen=True)
class Answers:
    """One entry for each picture, in the order of `sample_ids`. Everything that is counted is a function of these."""

    sample_ids: np.ndarray
    """int64 (n,)."""
    labels: np.ndarray
    """int64 (n,)."""
    predicted: np.ndarray
    """int64 (n,): the class of the largest logit, the first of equals."""
    label_rank: np.ndarray
    """int64 (n,): how many classes stand before the label; 0 is right, below 5 is among the first five."""
    loss: np.ndarray
    """float64 (n,): cross-entropy in nats."""
    confidence: np.ndarray
    """float64 (n,): softmax of the class that was answered."""
    margin: np.ndarray
    """float64 (n,): the largest logit less the next; infinite where there is one class alone."""
    largest: np.ndarray
    """float64 (n,): the largest absolute logit, to which the rounding bound is relative."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    @classmethod
    def none(cls) -> Answers:
        """To no picture."""
        return answers_of(torch.zeros(0, 1), *torch.zeros(2, 0, dtype=torch.int64))

    @property
    def right(self) -> np.ndarray:
        """bool (n,)."""
        return self.label_rank == 0

    @property
    def top1(self) -> int:
        return int(self.right.sum())

    @property
    def top5(self) -> int:
        return int((self.label_rank < 5).sum())

    @property
    def mean_loss(self) -> float:
        """Nats. Summed exactly, so that it is the same in any order."""
        return math.fsum(self.loss) / len(self)

    @property
    def near_ties(self) -> np.ndarray:
        """Sample ids, int64, of those whose first two logits lie closer than float32 can be trusted to order them."""
        return np.sort(self.sample_ids[self.margin <= ROUNDING * self.largest])

    def by_id(self) -> Answers:
        """The same, in the order of sample ids."""
        return self.at(np.argsort(self.sample_ids, kind="stable"))

    def at(self, places: np.ndarray) -> Answers:
        """Those at `places`, int64, in that order."""
        return Answers(*(column[places] for column in self.columns()))

    def columns(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def per_class(self, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """(right, seen), int64 (classes,) each, by label."""
        right = np.bincount(self.labels[self.right], minlength=classes)
        return right, np.bincount(self.labels, minlength=classes)

    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al. 2017): |share right - confidence|, weighed, over 15 equal bins."""
        bins = np.minimum((self.confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
        gaps = self.right - self.confidence
        return math.fsum(abs(math.fsum(gaps[bins == bin])) for bin in range(CALIBRATION_BINS)) / len(self)


def answers_of(logits: Tensor, labels: Tensor, sample_ids: Tensor) -> Answers:
    """logits: float (B, C), on any device; labels, sample_ids: int64 (B,), labels from 0 to C - 1.

    Errors: ValueError where a logit is not finite.
    """
    logits = logits.detach().to(torch.float64)
    labels, sample_ids = labels.to(logits.device), sample_ids.to(logits.device)
    finite = torch.isfinite(logits).all(1)
    if not finite.all():
        raise ValueError(
            f"the model's output is not finite at sample {int(sample_ids[~finite][0])}: it cannot be ranked"
        )
    best = logits.topk(min(2, logits.shape[1]), dim=1).values
    margin = best[:, 0] - best[:, 1] if best.shape[1] == 2 else torch.full_like(best[:, 0], torch.inf)
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    rank = ((logits > own) | ((logits == own) & (classes < labels[:, None]))).sum(1)
    log_shares = F.log_softmax(logits, dim=1)
    columns = (
        sample_ids,
        labels,
        logits.argmax(1),  # the first of equals
        rank,
        -log_shares.gather(1, labels[:, None])[:, 0],
        log_shares.amax(1).exp(),
        margin,
        logits.abs().amax(1),
    )
    return Answers(*(column.cpu().numpy() for column in columns))


def joined(parts: Iterable[Answers], most: int) -> Answers:
    """One after the other, up to `most` answers in all.

    Each part may go once it is copied: kept among the large buffers of a pass, its small arrays would break up the
    heap, which then grew with the pictures.
    """
    columns = [np.empty(most, column.dtype) for column in Answers.none().columns()]
    filled = 0
    for part in parts:
        for column, own in zip(columns, part.columns(), strict=True):
            column[filled : filled + len(part)] = own
        filled += len(part)
    return Answers(*(column[:filled] for column in columns))
