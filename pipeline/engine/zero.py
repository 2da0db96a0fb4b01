"""DeepSpeed's ZeRO: optimiser state (1), gradients (2) and weights (3) are shared out among the ranks.

The model runs with weights in the arithmetic's precision; each rank steps its part of a float32 copy, the masters.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.data.order import Layout
from pipeline.engine.protocol import Step, poisoned
from pipeline.engine.shards import Shards
from pipeline.engine.states import create_states
from pipeline.engine.stretches import Stretch, from_rank_0
from pipeline.parallel import LOSS_SCALE_WINDOW, ParallelConfig, Strategy, assert_engine, build_accelerator
from pipeline.pieces import WEIGHT, Piece


class ZeroEngine:
    """DeepSpeed clips, checks the gradients of all ranks and skips the step; pieces are parts of the masters."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: ParallelConfig,
        strategy: Strategy,
        layout: Layout,
        clip_grad_norm: float | None,
        ema_decay: float | None,
    ) -> None:
        self.strategy = strategy
        self._model = model
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        start = {name: value.detach().float().clone().cpu() for name, value in model.named_parameters()}
        if config.autocast_dtype is not None:
            model.register_forward_pre_hook(_cast_to(config.autocast_dtype))
        elements = sum(value.numel() for value in start.values())
        accelerator = build_accelerator(config, strategy, layout, clip_grad_norm, elements)
        self.device: torch.device = accelerator.device
        self.module, _ = accelerator.prepare(model, optimizer)
        assert_engine(self.module, strategy, layout.world_size)
        self._zero: Any = self.module.optimizer
        # DeepSpeed reduces over a group of its own, with torch's default: 30 minutes for gloo.
        dist.set_timeout(timedelta(seconds=config.timeout_seconds), self._zero.dp_process_group)
        self._zero.loss_scaler.raise_error_at_min_scale = False  # the trainer counts the steps that are skipped
        self.optimizer = optimizer
        create_states(optimizer, self._masters())
        # The frozen are kept apart: the model's are rounded, and in partitions under ZeRO-3.
        buffers = {name: value for name, value in start.items() if name not in trainable}
        buffers |= {name: value for name, value in model.state_dict().items() if name not in self._shapes}
        self._frozen = [name for name in buffers if name in self._shapes]
        stretches = self._stretches(layout.rank)
        from_rank_0(start.values(), layout.world_size, self.device)
        for stretch in stretches:  # DeepSpeed made its masters of the rounded weights
            own = start[stretch.name].view(-1)[stretch.start : stretch.start + stretch.length]
            stretch.of(stretch.owner).copy_(own)
        keys = list(model.state_dict())
        self._shards = Shards(stretches, optimizer, buffers, keys, layout, self.device, ema_decay)

    def _masters(self) -> list[list[Tensor]]:
        """Of each parameter group."""
        if self.strategy != "zero3":
            return [[part] for part in self._zero.single_partition_of_fp32_groups]
        found: list[list[Tensor]] = [[] for _ in self._zero.optimizer.param_groups]
        for index, part in enumerate(self._zero.fp32_partitioned_groups_flat):
            found[self._zero.sub_group_to_group_id[index]].append(part)
        return found

    def _stretches(self, rank: int) -> list[Stretch]:
        if self.strategy == "zero3":
            return self._parts_of_each(rank)
        found = []
        for parameters, master in zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True):
            for parameter in parameters:
                part = parameter._hp_mapping
                if part is None:  # none of it is this rank's
                    continue
                name, inside, outside = self._names[parameter], part.hp_fragment_address, part.lp_fragment_address
                found.append(Stretch(name, self._shapes[name], outside.start, inside.numel, master, inside.start))
        return found

    def _parts_of_each(self, rank: int) -> list[Stretch]:
        """ZeRO-3 gives each rank a part of every parameter, the last ones padded or nothing but padding."""
        found = []
        for parameters in self._zero.fp16_groups:
            for parameter in parameters:
                index, offset, held = self._zero.grad_position[self._zero.get_param_id(parameter)]
                name, start = self._names[parameter], held * rank
                length = min(held, parameter.ds_numel - start)
                if length > 0:
                    master = self._zero.fp32_partitioned_groups_flat[index]
                    found.append(Stretch(name, self._shapes[name], start, length, master, offset))
        return found

    def backward(self, loss: Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(poisoned(loss))

    def step(self) -> Step:
        self.module.step()
        step = Step(self.module.was_step_applied(), float(self.module.get_global_grad_norm()))
        if step.applied and self._shards.ema is not None:
            self._shards.ema.update()
        return step

    def pieces(self) -> list[Piece]:
        return self._shards.pieces()

    def buffers(self) -> dict[str, Tensor]:
        return self._shards.buffers

    def scalars(self) -> dict[str, float | int]:
        found, scaler = self._shards.scalars(), self._zero.loss_scaler
        if scaler.dynamic:
            good = (scaler.cur_iter - scaler.last_overflow_iter - 1) % LOSS_SCALE_WINDOW
            found |= {"loss_scale": scaler.cur_scale, "loss_scale_good_steps": good}
        return found

    def load_scalars(self, scalars: dict[str, float | int]) -> None:
        self._shards.load_scalars(scalars)
        scaler = self._zero.loss_scaler
        if scaler.dynamic and "loss_scale" in scalars:
            scaler.cur_scale, scaler.last_overflow_iter = float(scalars["loss_scale"]), -1
            scaler.cur_iter = int(scalars["loss_scale_good_steps"])

    @torch.no_grad()
    def loaded(self) -> None:
        from_rank_0(self._shards.buffers.values(), self._shards.world_size, self.device)
        if self.strategy == "zero3":
            self._masters_to_partitions()
        else:
            self._zero.update_lp_params()
        self._show_frozen()

    def _masters_to_partitions(self) -> None:
        """As at the end of DeepSpeed's own step."""
        self._zero.parameter_offload.partition_all_parameters()
        for index, master in enumerate(self._zero.fp32_partitioned_groups_flat):
            self._zero.fp16_partitioned_groups_flat[index].copy_(master)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def _show_frozen(self) -> None:
        import deepspeed

        running = dict(self._model.named_parameters())
        for name in self._frozen:
            if self.strategy == "zero3":
                with deepspeed.zero.GatheredParameters([running[name]], modifier_rank=0):
                    if not dist.is_initialized() or dist.get_rank() == 0:
                        running[name].copy_(self._shards.buffers[name])
            else:
                running[name].copy_(self._shards.buffers[name])

    def full_weights(self, kind: str = WEIGHT) -> dict[str, Tensor]:
        return self._shards.whole(kind)


def _cast_to(dtype: torch.dtype):
    """A hook that gives the model its inputs in the format of its weights."""

    def cast(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)

    return cast
