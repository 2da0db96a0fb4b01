"""Optimiser, parameter groups and learning-rate schedule: timm's, chosen by options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from pipeline.data.order import Layout

# Their update of an element depends on the others of its tensor: on ZeRO's flattened partitions they would be wrong.
PER_TENSOR = frozenset({"lamb", "muon"})


@dataclass(frozen=True)
class OptimConfig:
    """An optimiser of timm's, and a cosine schedule after a linear warm-up. No weight decay on biases and norms."""

    optimizer: Literal["adamw", "sgd", "lamb", "muon"] = "adamw"
    """lamb and muon look at whole tensors, so they need parallel.strategy ddp. Muon takes the matrices and
    convolutions, timm's AdamW the rest."""
    lr: float = 1e-3
    """Peak learning rate, for the global batch as it is (no scaling rule is applied)."""
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's and LAMB's, and Muon's for what AdamW does there."""
    momentum: float = 0.9
    """SGD's (Nesterov) and Muon's, whose source has 0.95."""
    layer_decay: float | None = None
    """Each layer learns at this share of the rate of the layer after it, as in BEiT; None: all at one rate."""
    warmup_epochs: float = 5.0
    warmup_samples: int | None = None
    """Length of the warm-up in samples instead of epochs."""
    cooldown_epochs: float = 0.0
    """At min_lr, after the cosine has come down to it; part of the run's length."""
    cooldown_samples: int | None = None
    """Length of the cool-down in samples instead of epochs."""
    clip_grad_norm: float | None = 1.0
    ema_decay: float | None = None
    """Keep an average of the weights, this much of the last one in each step; it is saved and evaluated too."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optim.lr is {self.lr}: it must be above 0")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"optim.min_lr is {self.min_lr}: from 0 to optim.lr ({self.lr})")
        for name in ("weight_decay", "warmup_epochs", "warmup_samples", "cooldown_epochs", "cooldown_samples"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"optim.{name} is {value}: at least 0")
        for name, value in (("momentum", self.momentum), ("ema_decay", self.ema_decay)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"optim.{name} is {value}: from 0 to below 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas is {self.betas}: two numbers from 0 to below 1")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay is {self.layer_decay}: above 0, at most 1, or None")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"optim.clip_grad_norm is {self.clip_grad_norm}: above 0, or None for no clipping")


def create_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Over the parameters that are trained, in timm's groups; with layer decay each group has its `lr_scale`.

    Errors: ValueError where no parameter is trained.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model.freeze leaves nothing to train: take fewer patterns")
    specific: dict[str, dict[str, Any]] = {
        "adamw": {"betas": config.betas},
        "sgd": {"momentum": config.momentum},
        "lamb": {"betas": config.betas, "max_grad_norm": None},  # else it would clip a second time, at 1
        "muon": {"betas": config.betas, "momentum": config.momentum},
    }
    return create_optimizer_v2(
        model,
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        **specific[config.optimizer],
    )


def create_schedule(
    optimizer: Optimizer, config: OptimConfig, total_steps: int, steps_per_epoch: int, layout: Layout
) -> CosineLRScheduler:
    """`schedule.step_update(step)` sets that step's rates: a function of the step alone, so resuming needs no state.

    A group's rate is the schedule's times the group's `lr_scale`, the lowest rate too.
    Errors: ValueError where warm-up and cool-down leave nothing of the run.
    """
    warmup = _steps(config.warmup_epochs, config.warmup_samples, steps_per_epoch, layout)
    cooldown = _steps(config.cooldown_epochs, config.cooldown_samples, steps_per_epoch, layout)
    if warmup + cooldown >= total_steps:
        lengths = f"{_described('warmup', config)} and {_described('cooldown', config)}"
        raise ValueError(
            f"{lengths} ({warmup} + {cooldown} steps) leave nothing of a run of {total_steps} steps "
            f"({total_steps / steps_per_epoch:g} epochs): lower them"
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=total_steps - warmup - cooldown,
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,  # else the cosine would run under the warm-up, and the peak would never be reached
        warmup_lr_init=config.lr / max(1, warmup),  # not 0: a first step at rate 0 would be thrown away
        t_in_epochs=False,
    )


def _steps(epochs: float, samples: int | None, steps_per_epoch: int, layout: Layout) -> int:
    return round(epochs * steps_per_epoch) if samples is None else round(samples / layout.global_batch)


def _described(part: Literal["warmup", "cooldown"], config: OptimConfig) -> str:
    unit = "epochs" if getattr(config, f"{part}_samples") is None else "samples"
    return f"optim.{part}_{unit} {getattr(config, f'{part}_{unit}')}"
