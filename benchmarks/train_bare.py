"""What a person would write without a trainer: a bare DDP loop, and the same around DeepSpeed's engine.

Both read batches of the trainer's own loader: loaders are another benchmark's question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import TrainLoader
from pipeline.models import create_model, timm_settings

Apply = Callable[[Tensor], None]  # takes the loss


class BareLoop:
    """One step is: normalise, forward, backward, clip, AdamW; on the CPU, in float32, without accumulation."""

    def __init__(self, loader: TrainLoader, model: nn.Module, module: nn.Module, apply: Apply) -> None:
        """module: what wraps the model. apply: backward, clip and optimiser."""
        settings = timm_settings(model)
        self.mean, self.std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
        self.loader, self.module, self.apply = loader, module, apply

    def round(self, steps: int) -> float:
        """Takes so many steps; returns the last one's loss on this rank."""
        for batch in islice(_for_ever(self.loader), steps):
            x = (batch.images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
            loss = nn.functional.cross_entropy(self.module(x), batch.labels)
            self.apply(loss)
        return loss.item()


def bare_ddp(config: TrainConfig, loader: TrainLoader) -> BareLoop:
    """Around torch's DistributedDataParallel, the gradients lying in its buckets."""
    model, optimizer = _start(config, loader)
    module = DistributedDataParallel(model, gradient_as_bucket_view=True)
    clip = config.optim.clip_grad_norm
    assert clip is not None

    def apply(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()

    return BareLoop(loader, model, module, apply)


def bare_deepspeed(config: TrainConfig, loader: TrainLoader, stage: int) -> BareLoop:
    """Around DeepSpeed's engine at a ZeRO stage, which clips by itself. Its buckets hold all gradients, as DDP's."""
    import deepspeed

    model, optimizer = _start(config, loader)
    elements = sum(parameter.numel() for parameter in model.parameters())
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": loader.layout.micro_batch,
        "train_batch_size": loader.layout.global_batch,
        "gradient_clipping": config.optim.clip_grad_norm,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": elements,
            "allgather_bucket_size": elements + elements % 2,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    def apply(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return BareLoop(loader, model, engine, apply)


def _start(config: TrainConfig, loader: TrainLoader) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(config.seed)
    model = create_model(config.model, len(loader.reader.classes), config.data.image_size)
    optim = config.optim
    groups = model.parameters()
    return model, torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)


def _for_ever(loader: TrainLoader) -> Iterator[Batch]:
    while True:
        yield from loader
