"""How a model is trained on many ranks: one interface over DDP and ZeRO 1 to 3, at any precision."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from pipeline.data.order import Layout
from pipeline.engine.ddp import DdpEngine
from pipeline.engine.protocol import Engine, Step
from pipeline.engine.strategy import check_optimizer, check_strategy, has_batch_norm, resolve_strategy
from pipeline.engine.zero import ZeroEngine
from pipeline.parallel import ParallelConfig, join_ranks, ranks_from_environment

__all__ = ["Engine", "Step", "check_engine", "create_engine"]


def check_engine(model: nn.Module, optimizer: Optimizer, config: ParallelConfig) -> None:
    """What create_engine would refuse, without any rank; what `auto` will choose is not known yet.

    Errors: ValueError.
    """
    check_optimizer(optimizer, config)
    if config.strategy != "auto":
        check_strategy(config.strategy, model, config)
    if config.activation_checkpointing and not hasattr(model, "set_grad_checkpointing"):
        raise ValueError(f"parallel.activation_checkpointing: {type(model).__name__} has no blocks to recompute")
    if config.activation_checkpointing and has_batch_norm(model):
        raise ValueError(
            "parallel.activation_checkpointing: BatchNorm would count each batch twice in its averages; leave it out"
        )


def create_engine(
    model: nn.Module,
    optimizer: Optimizer,
    config: ParallelConfig,
    layout: Layout,
    clip_grad_norm: float | None,
    ema_decay: float | None,
) -> Engine:
    """Collective. Spreads model and optimiser as `config` says; `auto` says on rank 0 what it chose.

    model: timm's, the same on all ranks, on any device; it is changed in place and its state_dict keeps its keys.
    ema_decay: of the weights' average, None for none.
    Errors: ValueError for what the options, the model or the optimiser cannot do together.
    """
    check_engine(model, optimizer, config)
    ranks = ranks_from_environment()
    device = join_ranks(ranks, config.timeout_seconds)
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    elements = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    strategy, why = resolve_strategy(optimizer, elements, config, layout.world_size, ema_decay is not None, device)
    if why is not None and layout.rank == 0:
        print(why, flush=True)
    if strategy != "ddp" and not ranks.launched:
        raise ValueError(
            f"parallel.strategy is {strategy}, and no launcher started this process: give --parallel.processes"
        )
    check_strategy(strategy, model, config)
    _set_options(model, config)
    if strategy == "ddp":
        return DdpEngine(model, optimizer, config, layout, clip_grad_norm, ema_decay)
    return ZeroEngine(model, optimizer, config, strategy, layout, clip_grad_norm, ema_decay)


def _set_options(model: nn.Module, config: ParallelConfig) -> None:
    if config.activation_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if config.compile:
        model.compile()  # in place: the keys of its state_dict stay timm's
