"""Optimiser, parameter groups and learning-rate schedule: timm's, chosen by options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimConfig:
    """AdamW or SGD with a cosine schedule after a linear warm-up. No weight decay on biases and norms."""

    # ZeRO flattens parameters, so optimisers that need each tensor's shape (LAMB, Muon) would be wrong on it.
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate, for the global batch as it is (no scaling rule is applied)."""
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW only."""
    momentum: float = 0.9
    """SGD only (Nesterov)."""
    warmup_epochs: float = 5.0
    clip_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optim.lr is {self.lr}: it must be above 0")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"optim.min_lr is {self.min_lr}: from 0 to optim.lr ({self.lr})")
        if not self.weight_decay >= 0:
            raise ValueError(f"optim.weight_decay is {self.weight_decay}: at least 0")
        if not self.warmup_epochs >= 0:
            raise ValueError(f"optim.warmup_epochs is {self.warmup_epochs}: at least 0")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"optim.clip_grad_norm is {self.clip_grad_norm}: above 0, or None for no clipping")


def create_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    specific = {"betas": config.betas} if config.optimizer == "adamw" else {"momentum": config.momentum}
    return create_optimizer_v2(
        model,
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        **specific,
    )


def create_schedule(optimizer: Optimizer, config: OptimConfig, epochs: int, steps_per_epoch: int) -> CosineLRScheduler:
    """`schedule.step_update(step)` sets that step's rate: a function of the step alone, so resuming needs no state.

    Errors: ValueError where the warm-up is longer than the run.
    """
    total, warmup = epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
    if warmup >= total:
        raise ValueError(
            f"optim.warmup_epochs {config.warmup_epochs} leaves nothing of a run of {epochs} epochs: lower it"
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,  # else the cosine would run under the warm-up, and the peak would never be reached
        warmup_lr_init=config.lr / max(1, warmup),  # not 0: a first step at rate 0 would be thrown away
        t_in_epochs=False,
    )
