"""What the trainer asks of an engine, whatever its strategy."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.parallel import Strategy
from pipeline.pieces import WEIGHT, Piece


class Step(NamedTuple):
    applied: bool
    grad_norm: float  # over all ranks, before clipping; not finite where the step was not applied


def poisoned(loss: Tensor) -> Tensor:
    """The loss; where it is not finite its gradients are NaN too, so that the check of the reduced ones sees it."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))


class Engine(Protocol):
    """A model spread over ranks, with its optimiser, average and precision."""

    strategy: Strategy
    device: torch.device
    module: nn.Module
    """Call this in the forward pass."""
    optimizer: Optimizer
    """Its param_groups take the schedule's rates."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds a micro-batch's gradients, divided by the accumulation. last: of the step; they are reduced then.

        loss: scalar, the micro-batch's mean. One that is not finite on any rank spoils the step on all.
        """

    def step(self) -> Step:
        """Collective. Clips and applies the gradients, drops them, updates the average.

        Where their norm over all ranks is not finite nothing changes on any rank but the loss scale: not the weights,
        nor the optimiser's state, nor the average. BatchNorm's running averages moved in the forward pass.
        """

    def pieces(self) -> list[Piece]:
        """Live views of what this rank owns; over all ranks each element of each trainable parameter exactly once."""

    def buffers(self) -> dict[str, Tensor]:
        """Live: what a state_dict holds besides, BatchNorm's averages and frozen parameters. Rank 0's count."""

    def scalars(self) -> dict[str, float | int]:
        """Optimiser steps, updates of the average, the loss scale: the same on all ranks and in all strategies."""

    def load_scalars(self, scalars: dict[str, float | int]) -> None: ...

    def loaded(self) -> None:
        """Collective, after pieces and buffers were written into: brings them to all ranks and the running weights."""

    def full_weights(self, kind: str = WEIGHT) -> dict[str, Tensor]:
        """Collective. Every rank gets a whole state_dict on the CPU, floats in float32. kind: or "ema".

        Buffers are rank 0's in both. Errors: ValueError for a kind that the run does not keep.
        """
