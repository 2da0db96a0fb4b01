"""Every rank holds all of the state; gradients are averaged by torch's DistributedDataParallel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from pipeline.data.order import Layout
from pipeline.engine.protocol import Step, poisoned
from pipeline.engine.shards import Shards
from pipeline.engine.states import by_element, create_states
from pipeline.engine.stretches import even_share, from_rank_0
from pipeline.parallel import LOSS_SCALE_WINDOW, ParallelConfig, Strategy, assert_engine, build_accelerator
from pipeline.pieces import WEIGHT, Piece


class DdpEngine:
    """float32 weights, under autocast for bf16 and fp16; fp16 with a scaled loss. A checkpoint takes an even share."""

    strategy: Strategy = "ddp"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: ParallelConfig,
        layout: Layout,
        clip_grad_norm: float | None,
        ema_decay: float | None,
    ) -> None:
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        for parameter in self._parameters.values():
            parameter.data = parameter.data.contiguous()  # pieces are views of the flattened
        elements = sum(parameter.numel() for parameter in self._parameters.values())
        accelerator = build_accelerator(config, "ddp", layout, clip_grad_norm, elements)
        self.device: torch.device = accelerator.device
        if config.autocast_dtype is not None:
            _run_under_autocast(model, self.device, config.autocast_dtype)
        self.module: nn.Module = accelerator.prepare(model)
        assert_engine(self.module, self.strategy, layout.world_size)
        self.optimizer = optimizer
        self._clip = clip_grad_norm
        self._accumulation = layout.accumulation
        self._scaler = torch.amp.GradScaler(
            self.device.type, growth_interval=LOSS_SCALE_WINDOW, enabled=config.precision == "fp16"
        )
        create_states(optimizer, [list(group["params"]) for group in optimizer.param_groups])
        state_dict = model.state_dict()
        buffers = {name: value for name, value in state_dict.items() if name not in self._parameters}
        share = even_share(self._parameters.items(), layout.rank, layout.world_size)
        self._shards = Shards(share, optimizer, buffers, list(state_dict), layout, self.device, ema_decay)
        self._micro_step = 0
        self._announce_micro_step()

    def backward(self, loss: Tensor, last: bool) -> None:
        assert last == (self._micro_step == self._accumulation - 1), "an accumulation has always the same length"
        self._scaler.scale(poisoned(loss) / self._accumulation).backward()
        self._micro_step = 0 if last else self._micro_step + 1
        self._announce_micro_step()

    def _announce_micro_step(self) -> None:
        """DDP decides in the forward pass whether the backward pass will reduce: what its no_sync() sets."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel):
            self.module.require_backward_grad_sync = self._micro_step == self._accumulation - 1

    def step(self) -> Step:
        """The reduced gradients are the same on all ranks, so each finds the same norm and decides alone."""
        if self._scaler.is_enabled():
            self._scaler.unscale_(self.optimizer)
        gradients = [value.grad for value in self._parameters.values() if value.grad is not None]
        norm = get_total_norm(gradients)
        grad_norm = norm.item()
        applied = math.isfinite(grad_norm)
        if applied:
            if self._clip is not None:
                clip_grads_with_norm_(self._parameters.values(), self._clip, norm)
            self.optimizer.step()
        if self._scaler.is_enabled():
            self._scaler.update()
        self.optimizer.zero_grad()
        if applied and self._shards.ema is not None:
            self._shards.ema.update()
        return Step(applied, grad_norm)

    def pieces(self) -> list[Piece]:
        return self._shards.pieces()

    def buffers(self) -> dict[str, Tensor]:
        return self._shards.buffers

    def scalars(self) -> dict[str, float | int]:
        found = self._shards.scalars()
        if self._scaler.is_enabled():
            state = self._scaler.state_dict()
            found |= {"loss_scale": state["scale"], "loss_scale_good_steps": state["_growth_tracker"]}
        return found

    def load_scalars(self, scalars: dict[str, float | int]) -> None:
        self._shards.load_scalars(scalars)
        if self._scaler.is_enabled() and "loss_scale" in scalars:
            state: dict[str, Any] = self._scaler.state_dict()
            state |= {"scale": scalars["loss_scale"], "_growth_tracker": scalars["loss_scale_good_steps"]}
            self._scaler.load_state_dict(state)

    def loaded(self) -> None:
        states = {name: by_element(self.optimizer, value) for name, value in self._parameters.items()}
        for kind in dict.fromkeys(kind for state in states.values() for kind in (WEIGHT, *state)):
            for name, whole in self._shards.gather(kind).items():
                target = self._parameters[name] if kind == WEIGHT else states[name][kind]
                target.detach().copy_(whole)
        from_rank_0(self._shards.buffers.values(), self._shards.world_size, self.device)

    def full_weights(self, kind: str = WEIGHT) -> dict[str, Tensor]:
        return self._shards.whole(kind)


def _run_under_autocast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    forward = model.forward

    def autocast_forward(*inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return forward(*inputs)

    model.forward = autocast_forward
