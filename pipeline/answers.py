"""What a model answered to each picture: all that is counted is counted of it, whatever the ranks and batches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# How far two sums of the same float32 products may lie apart in another batch or order, relative to the largest logit.
# 2^-24 a rounding, and a few hundred of them on the way: measured differences stay below a tenth of this.
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
        """Nats. In the order of sample ids, so that the sum is the same for any number of ranks."""
        return float(self.by_id().loss.mean())

    @property
    def near_ties(self) -> np.ndarray:
        """Sample ids, int64, of those whose first two logits lie closer than float32 can be trusted to order them."""
        return np.sort(self.sample_ids[self.margin < ROUNDING * self.largest])

    def by_id(self) -> Answers:
        """The same, in the order of sample ids."""
        order = np.argsort(self.sample_ids, kind="stable")
        return Answers(*(column[order] for column in self.columns()))

    def columns(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def per_class(self, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """(right, seen), int64 (classes,) each, by label."""
        right = np.bincount(self.labels[self.right], minlength=classes)
        return right, np.bincount(self.labels, minlength=classes)

    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al. 2017): |share right - confidence|, weighed, over 15 equal bins."""
        own = self.by_id()
        bins = np.minimum((own.confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
        gap = np.bincount(bins, own.right - own.confidence, CALIBRATION_BINS)
        return float(np.abs(gap).sum() / len(self))


def answers_of(logits: Tensor, labels: Tensor, sample_ids: Tensor) -> Answers:
    """logits: float (B, C), on any device; labels, sample_ids: int64 (B,), labels from 0 to C - 1.

    Errors: ValueError where a logit is not finite.
    """
    logits = logits.detach().to("cpu", torch.float64)
    labels, sample_ids = labels.cpu(), sample_ids.cpu()
    if not torch.isfinite(logits).all():
        bad = int(sample_ids[~torch.isfinite(logits).all(1)][0])
        raise ValueError(f"the model's output is not finite at sample {bad}: it cannot be ranked")
    best = logits.topk(min(2, logits.shape[1]), dim=1).values
    margin = best[:, 0] - best[:, 1] if best.shape[1] == 2 else torch.full((len(logits),), torch.inf).double()
    predicted = logits.argmax(1)  # the first of equals
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1])
    rank = ((logits > own) | ((logits == own) & (classes < labels[:, None]))).sum(1)
    log_shares = F.log_softmax(logits, dim=1)
    return Answers(
        sample_ids=sample_ids.numpy(),
        labels=labels.numpy(),
        predicted=predicted.numpy(),
        label_rank=rank.numpy(),
        loss=-log_shares.gather(1, labels[:, None])[:, 0].numpy(),
        confidence=log_shares.amax(1).exp().numpy(),
        margin=margin.numpy(),
        largest=logits.abs().amax(1).numpy(),
    )


def joined(parts: list[Answers]) -> Answers:
    """One after the other."""
    assert parts, "no answers to join"
    return Answers(*(np.concatenate(columns) for columns in zip(*(part.columns() for part in parts), strict=True)))
