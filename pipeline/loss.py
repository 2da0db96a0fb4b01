"""The loss of a batch, from logits and soft targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class LossConfig:
    """Softmax cross-entropy, or binary cross-entropy of each class by itself."""

    kind: Literal["cross_entropy", "bce"] = "cross_entropy"
    bce_threshold: float | None = None
    """Targets above it count as 1, others as 0: at 0 both classes of a mixed picture are true, as in DeiT-III. None:
    targets as they are."""

    def __post_init__(self) -> None:
        if self.bce_threshold is None:
            return
        if self.kind != "bce":
            raise ValueError(f"loss.bce_threshold is {self.bce_threshold}, but loss.kind is {self.kind}: leave it out")
        if not 0 <= self.bce_threshold < 1:
            raise ValueError(f"loss.bce_threshold is {self.bce_threshold}: from 0 to below 1, or None")

    def check_smoothing(self, label_smoothing: float) -> None:
        """Errors: ValueError where smoothing lifts the targets of all classes above the threshold."""
        if self.bce_threshold == 0 and label_smoothing > 0:
            raise ValueError(
                f"label_smoothing is {label_smoothing} and loss.bce_threshold 0: every class would count as true; "
                "set one of them to another"
            )


def loss_of(logits: Tensor, targets: Tensor, config: LossConfig) -> Tensor:
    """Mean over the batch (and with bce over the classes), a scalar. logits, targets: float (B, classes)."""
    logits = logits.float()
    if config.kind == "cross_entropy":
        return nn.functional.cross_entropy(logits, targets)
    if config.bce_threshold is not None:
        targets = (targets > config.bce_threshold).to(targets.dtype)
    return nn.functional.binary_cross_entropy_with_logits(logits, targets)
