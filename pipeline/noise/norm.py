"""LayerNorm with noise behind it as a module, which stands where a block's own norm stood, by the same names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models.beit import Block as BeitBlock
from timm.models.vision_transformer import Block as VitBlock
from torch import Tensor, nn

from pipeline.noise.ops import NORM_UNIT, NORM_WIDEST

# Blocks that hand the output of a norm to this one part and to nothing else.
_BLOCKS = (VitBlock, BeitBlock)
_NORM_OF_PART = {"attn": "norm1", "mlp": "norm2"}

Noisy = Callable[[Tensor, "NormNoise"], Tensor | None]


def as_products_take(x: Tensor) -> Tensor:
    """x as a product would take it: rounded to autocast's type where that is on; float64 it leaves alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


class NormNoise(nn.LayerNorm):
    """The parameters of `norm`, and `noisy(x, self)` in place of its result; where that gives None, LayerNorm alone."""

    def __init__(self, norm: nn.LayerNorm, noisy: Noisy | None) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
        self.elementwise_affine = True
        self.weight, self.bias = norm.weight, norm.bias
        self.noisy = noisy
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.noisy is not None and (y := self.noisy(x, self)) is not None:
            return y
        return self.alone(x)

    def alone(self, x: Tensor) -> Tensor:
        """LayerNorm without noise."""
        return super().forward(x)


def norm_before(model: nn.Module, site: str) -> str | None:
    """The name of the LayerNorm that alone feeds a site, of those that norm_noise takes in one pass; None without one.

    Known for timm's ViT, DeiT and BEiT blocks: `blocks.3.attn` is fed by `blocks.3.norm1`, `blocks.3.mlp` by its norm2.
    """
    parent, _, part = site.rpartition(".")
    if part not in _NORM_OF_PART or type(model.get_submodule(parent)) not in _BLOCKS:
        return None
    name = f"{parent}.{_NORM_OF_PART[part]}"
    norm = model.get_submodule(name)
    if not isinstance(norm, nn.LayerNorm) or getattr(norm, "_fast_norm", False) or norm.weight is None:
        return None
    if norm.bias is None or len(norm.normalized_shape) != 1:
        return None
    width = norm.normalized_shape[0]
    return name if width % NORM_UNIT == 0 and width <= NORM_WIDEST else None
