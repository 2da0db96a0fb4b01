"""What the answers of one protocol come to: counts, their intervals, and whether two models differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.answers import Answers
from pipeline.intervals import Interval, mcnemar, sign_flip, wilson
from pipeline.sections import from_json, to_json

Order = Literal["manifest", "class", "shuffled"]
_DERIVED = ("top1", "top5", "top1_interval", "top5_interval")


@dataclass(frozen=True)
class NearTie:
    """A picture whose first two classes float32 cannot be trusted to order."""

    sample_id: int
    name: str
    """What messages call it: its file and its key."""


@dataclass(frozen=True)
class Accuracy:
    """One protocol's counts. `transductive`: another picture in the batch could have changed an answer."""

    protocol: str
    noise: str
    order: Order
    group_size: int
    num_images: int
    correct_top1: int
    correct_top5: int
    class_mate_share: float | None
    transductive: bool
    mean_loss: float
    """Cross-entropy in nats."""
    calibration_error: float
    """Expected, over 15 equal bins (Guo et al. 2017)."""
    near_ties: tuple[NearTie, ...] | None
    """By sample id. None where it was computed in 16 bits, for which no bound is stated."""

    @property
    def top1(self) -> float:
        return self.correct_top1 / self.num_images

    @property
    def top5(self) -> float:
        return self.correct_top5 / self.num_images

    @property
    def top1_interval(self) -> Interval:
        """95 %, Wilson's, of independent pictures. Those of a transductive figure are not: it then is too narrow."""
        return wilson(self.correct_top1, self.num_images)

    @property
    def top5_interval(self) -> Interval:
        """As top1_interval."""
        return wilson(self.correct_top5, self.num_images)

    def to_json(self) -> dict[str, Any]:
        """The fields, and what follows from them."""
        return to_json(self) | {name: to_json(getattr(self, name)) for name in _DERIVED}

    @classmethod
    def from_json(cls, body: dict[str, Any], where: str) -> Accuracy:
        """Errors: as sections.from_json; ValueError naming `where` where the counts cannot be."""
        found = from_json(cls, {name: value for name, value in body.items() if name not in _DERIVED}, where)
        if not 0 <= found.correct_top1 <= found.correct_top5 <= found.num_images or not found.num_images:
            raise ValueError(f"{where} is damaged (its counts of {found.protocol} cannot be)")
        return found


def accuracy_of(
    answers: Answers,
    protocol: str,
    noise: str = "none",
    order: Order = "manifest",
    group_size: int = 1,
    class_mate_share: float | None = None,
    transductive: bool = False,
    where: Callable[[int], str] | None = None,
) -> Accuracy:
    """Counts the answers of one protocol.

    where: what a sample id is called (Reader.where); None lists no near ties, since the answers are no float32 ones.
    """
    near_ties = None
    if where is not None:
        near_ties = tuple(NearTie(sample, where(sample)) for sample in answers.near_ties.tolist())
    return Accuracy(
        protocol,
        noise,
        order,
        group_size,
        len(answers),
        answers.top1,
        answers.top5,
        class_mate_share,
        transductive,
        answers.mean_loss,
        answers.calibration_error(),
        near_ties,
    )


@dataclass(frozen=True)
class Comparison:
    """Two models on the same pictures. Only those that one of them alone gets right say which is better."""

    num_images: int
    only_one: int
    only_other: int

    @property
    def p_value(self) -> float:
        """That they are equally good: McNemar's exact test, two-sided."""
        return mcnemar(self.only_one, self.only_other)

    def to_json(self) -> dict[str, Any]:
        return to_json(self) | {"p_value": self.p_value}


def compare(one: Answers, other: Answers) -> Comparison:
    """Errors: ValueError where they are answers to other pictures, or to other labels."""
    one, other = one.by_id(), other.by_id()
    if not np.array_equal(one.sample_ids, other.sample_ids):
        raise ValueError(
            f"{len(one)} and {len(other)} answers are not to the same pictures: evaluate both on one split"
        )
    if differing := int((one.labels != other.labels).sum()):
        raise ValueError(f"{differing} of {len(one)} pictures are labelled otherwise: evaluate both with one label map")
    return Comparison(len(one), int((one.right & ~other.right).sum()), int((other.right & ~one.right).sum()))


def compare_groups(one: Answers, other: Answers, k: int) -> float:
    """p that both are equally good, where the pictures of a group of k answers hang together: `sign_flip` of groups.

    Both answer the same pictures in the same order, of which k after one another are a group; k = 1 is McNemar's test.
    """
    assert np.array_equal(one.sample_ids, other.sample_ids), "groups are formed by one order"
    differences = one.right.astype(np.int64) - other.right
    return sign_flip(np.add.reduceat(differences, np.arange(0, len(differences), k)))
