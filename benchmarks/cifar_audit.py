"""What one trained model answers: the protocols of pipeline.audit, on pictures that lie on the device.

In float32 whatever it was trained in, so that no answer hangs on the rounding of a batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.answers import Answers, answers_of
from pipeline.audit.protocols import Settings, run_protocols
from pipeline.audit.rows import Row
from pipeline.data.order import class_order, evaluation_batches
from pipeline.models import Preprocess
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.precision import whole_float32

GROUP = 10  # the published protocol's batch
BATCH = 1000
OFFICIAL, RESIDUAL = "official", "residual"


def places(depth: int) -> dict[str, NoiseConfig]:
    """Where optimal Q acts at inference: the official place, and where it does most (PAPER.md, section 5)."""
    noise = NoiseConfig(kind="optimal_q", during="eval", group_size=GROUP)
    return {
        OFFICIAL: replace(noise, site=f"blocks.{depth - 1}.attn"),
        RESIDUAL: replace(noise, site=f"blocks.{depth - 1}", spare_prefix_tokens=False),
    }


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


def audit(model: nn.Module, tested: Tested, depth: int, shuffle_seed: int) -> list[Row]:
    """All protocols at both places, of the model without any noise of its own; it is left in evaluation."""
    respondent = InMemory(model, tested, shuffle_seed)
    settings = Settings(ks=(GROUP,), shuffles=1, shuffle_seed=shuffle_seed)
    return run_protocols(respondent, list(places(depth).values()), settings, class_order(tested.labels))


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
        with whole_float32():
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
