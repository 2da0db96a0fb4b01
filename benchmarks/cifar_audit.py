"""What one trained model answers: each picture on its own, and by the published protocol, in both orders.

In float32 whatever it was trained in, so that no answer hangs on the rounding of a batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.accuracy import Order, accuracy_of
from pipeline.answers import Answers, answers_of
from pipeline.data.order import class_mate_share, class_order, evaluation_batches, shuffled_order
from pipeline.intervals import wilson
from pipeline.models import Preprocess
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector

GROUP = 10  # the published protocol's batch
BATCH = 1000
PER_IMAGE, VOTE = "per_image", f"vote_class_k{GROUP}"
OFFICIAL, RESIDUAL = "official", "residual"


def places(depth: int) -> dict[str, NoiseConfig]:
    """Where optimal Q acts at inference: the official place, and where it does most (PAPER.md, section 5)."""
    noise = NoiseConfig(kind="optimal_q", during="eval", group_size=GROUP)
    return {
        OFFICIAL: replace(noise, site=f"blocks.{depth - 1}.attn"),
        RESIDUAL: replace(noise, site=f"blocks.{depth - 1}", spare_prefix_tokens=False),
    }


def protocol_of(place: str, order: Order) -> str:
    return f"{place}_{order}_k{GROUP}"


class Tested(NamedTuple):
    """The test split on the device."""

    images: Tensor  # uint8 (N, S, S, 3)
    labels: np.ndarray  # int64 (N,)


class InMemory:
    """A trained model that answers the test pictures: a Respondent of pipeline.audit. It is left in evaluation."""

    def __init__(self, model: nn.Module, tested: Tested, seed: int) -> None:
        """seed: of the noise that is drawn at inference, and of the choice among several sites."""
        self.model = model.eval()
        self._seed = seed
        self.labels = tested.labels
        self._tested = tested
        self.plain_logits = logits_of(model, NoiseConfig(), tested, np.arange(len(tested.labels)))

    def answers(self, noise: NoiseConfig, order: np.ndarray) -> Answers:
        """As Respondent."""
        logits = ordered_logits(self.model, noise, self._tested, order, self._seed)
        return answers_of(logits, torch.from_numpy(self.labels[order]), torch.from_numpy(order))


class Audit(NamedTuple):
    accuracies: list[dict[str, Any]]
    """Accuracy.to_json() and `interval`, per image first."""
    k1_differing: dict[str, int]
    """By place: pictures to which optimal Q at k = 1 gives another answer than no noise does. All must be 0."""


def audit(model: nn.Module, tested: Tested, depth: int, shuffle_seed: int) -> Audit:
    """The model without any noise of its own; it is left in evaluation."""
    model.eval()
    labels = tested.labels
    in_order, by_class = np.arange(len(labels)), class_order(labels)
    orders: dict[Order, np.ndarray] = {"class": by_class, "shuffled": shuffled_order(len(labels), shuffle_seed)}
    plain = logits_of(model, NoiseConfig(), tested, in_order)
    votes = averaged(plain, by_class)
    accuracies = [_accuracy(PER_IMAGE, NoiseConfig(), "manifest", in_order, plain, labels)]
    k1_differing = {}
    for place, noise in places(depth).items():
        for order, ids in orders.items():
            logits = logits_of(model, noise, tested, ids)
            accuracies.append(_accuracy(protocol_of(place, order), noise, order, ids, logits, labels))
        alone = logits_of(model, replace(noise, group_size=1), tested, in_order)
        k1_differing[place] = int((alone.argmax(1) != plain.argmax(1)).sum())
    accuracies.append(_accuracy(VOTE, NoiseConfig(), "class", by_class, votes, labels))
    return Audit(accuracies, k1_differing)


def logits_of(model: nn.Module, noise: NoiseConfig, tested: Tested, order: np.ndarray) -> Tensor:
    """float32 (N, classes) by sample id, on the CPU; `order`, of all, decides who is in a group with whom."""
    logits = ordered_logits(model, noise, tested, order)
    return logits[torch.from_numpy(np.argsort(order))]


@torch.no_grad()
def ordered_logits(model: nn.Module, noise: NoiseConfig, tested: Tested, order: np.ndarray, seed: int = 0) -> Tensor:
    """float32 (len(order), classes), on the CPU, as they come."""
    device = tested.images.device
    injector = NoiseInjector(model, noise, tested.images.shape[1], seed)
    preprocess = Preprocess(model, device, injector)
    answers = []
    try:
        for batch in evaluation_batches(order, BATCH, noise.group_size or 1, rank=0, world_size=1):
            ids = torch.from_numpy(batch).to(device)
            injector.set_batch(ids, epoch=0)
            answers.append(model(preprocess(tested.images[ids])).float())
    finally:
        injector.remove()
    logits = torch.cat(answers)
    if not torch.isfinite(logits).all():
        raise ValueError("the trained model's output is not finite: lower --lr")
    return logits.cpu()


def averaged(logits: Tensor, order: np.ndarray) -> Tensor:
    """Every sample gets its group's mean: plain voting, which needs no noise."""
    mean = torch.empty_like(logits)
    for group in torch.from_numpy(order).split(GROUP):
        mean[group] = logits[group].mean(0)
    return mean


def _accuracy(
    protocol: str, noise: NoiseConfig, order: Order, ids: np.ndarray, logits: Tensor, labels: np.ndarray
) -> dict[str, Any]:
    group = GROUP if protocol != PER_IMAGE else 1
    answers = answers_of(logits, torch.from_numpy(labels), torch.arange(len(labels)))
    share = class_mate_share(labels[ids], group) if group > 1 else None
    name = "test picture {}".format
    accuracy = accuracy_of(answers, protocol, noise.describe(), order, group, share, group > 1, name)
    return accuracy.to_json() | {"interval": list(wilson(accuracy.correct_top1, len(labels)))}
