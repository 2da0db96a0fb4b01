"""What the forward pass of training changes by itself: BatchNorm's running averages."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class MovingAverages:
    """A copy of before a step, which comes back where the step is then not taken."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._live = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._kept = [buffer.clone() for buffer in self._live]

    def remember(self) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            kept.copy_(live)

    def restore(self) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            live.copy_(kept)
