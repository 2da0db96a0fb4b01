"""The weights' exponential moving average, in float32, of the stretches that a rank owns: no rank holds a whole one."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.engine.stretches import Stretch


def decay_at(update: int, decay: float) -> float:
    """The decay of update 1, 2, ...: 0 at first, so that the start is forgotten, then 1 - update^(-2/3) up to `decay`.

    As timm's ModelEmaV3 with its warm-up's defaults.
    """
    return min(decay, 1.0 - update ** (-2 / 3))


class Ema:
    """Averages of (length,) each, parallel to the stretches. BatchNorm's buffers are averages already: not in it."""

    def __init__(self, decay: float, stretches: list[Stretch]) -> None:
        self.decay = decay
        self.updates = 0
        self._weights = [stretch.of(stretch.owner) for stretch in stretches]
        self.averages: list[Tensor] = [weight.clone() for weight in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        if self.averages:
            torch._foreach_lerp_(self.averages, self._weights, 1.0 - decay_at(self.updates, self.decay))
