"""What one trained model answers: each picture on its own, and by the published protocol, in both orders.

In float32 whatever it was trained in, so that no answer hangs on the rounding of a batch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.order import class_mate_share, class_order, evaluation_batches, shuffled_order
from pipeline.evaluate import Accuracy, Order
from pipeline.models import Preprocess
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector

GROUP = 10  # the published protocol's batch
BATCH = 1000
_TOP = 5
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


@torch.no_grad()
def logits_of(model: nn.Module, noise: NoiseConfig, tested: Tested, order: np.ndarray) -> Tensor:
    """float32 (N, classes) by sample id, on the CPU; `order` decides who is in a group with whom."""
    device = tested.images.device
    injector = NoiseInjector(model, noise, tested.images.shape[1], seed=0)
    preprocess = Preprocess(model, device, injector)
    logits: Tensor | None = None
    try:
        for batch in evaluation_batches(order, BATCH, noise.group_size or 1, rank=0, world_size=1):
            ids = torch.from_numpy(batch).to(device)
            injector.set_batch(ids, epoch=0)
            answer = model(preprocess(tested.images[ids])).float()
            if logits is None:
                logits = answer.new_full((len(order), answer.shape[1]), math.nan)
            logits[ids] = answer
    finally:
        injector.remove()
    assert logits is not None
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
    right = logits.topk(min(_TOP, logits.shape[1]), dim=1).indices == torch.from_numpy(labels)[:, None]
    group = GROUP if protocol != PER_IMAGE else 1
    accuracy = Accuracy(
        protocol=protocol,
        noise=noise.describe(),
        order=order,
        group_size=group,
        num_images=len(labels),
        correct_top1=int(right[:, 0].sum()),
        correct_top5=int(right.any(1).sum()),
        class_mate_share=class_mate_share(labels[ids], group) if group > 1 else None,
        transductive=group > 1,
    )
    return accuracy.to_json() | {"interval": list(wilson(accuracy.correct_top1, len(labels)))}


def wilson(correct: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927), here by hand: scipy is not in the smallest environment."""
    z = 1.959963984540054
    share, wide = correct / of, z * z / of
    middle = (share + wide / 2) / (1 + wide)
    half = z / (1 + wide) * math.sqrt(share * (1 - share) / of + wide / (4 * of))
    return middle - half, middle + half
