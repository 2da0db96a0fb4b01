"""Training on pictures that all lie on the device: there is no loader. What `cifar` and `accuracy` share.

Of one seed, initial weights, order, crops and flips are the same, whatever the noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cifar_audit import Tested
from benchmarks.cifar_data import Pictures, cropped, draw_crops, padded
from benchmarks.training_step import DTYPES, SMOOTHING, loss_function
from pipeline.data.order import Layout, Order, training_micro_batches
from pipeline.models import ModelConfig, Preprocess, create_model
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.optim import OptimConfig, create_optimizer, create_schedule

MAX_GRADIENT_NORM = 1.0


class OnDevice(NamedTuple):
    """All pictures, on the device for the whole run."""

    padded: Tensor  # uint8 (N, S + 8, S + 8, 3), of the training split
    labels: Tensor  # int64 (N,)
    tested: Tested
    classes: int
    side: int


def moved(pictures: Pictures, device: torch.device) -> OnDevice:
    return OnDevice(
        padded=padded(torch.from_numpy(pictures.train.images).to(device)),
        labels=torch.from_numpy(pictures.train.labels).to(device),
        tested=Tested(torch.from_numpy(pictures.test.images).to(device), pictures.test.labels),
        classes=len(pictures.classes),
        side=pictures.side,
    )


def conditions_of(pictures: Pictures, device: torch.device) -> dict[str, Any]:
    """What every result depends on beside its question's options."""
    return {
        "pictures": pictures.text,
        "pictures_sha256": pictures.sha256(),
        "classes": list(pictures.classes),
        "device": device.type,
        "optimizer": f"AdamW of pipeline.optim, gradients clipped to norm {MAX_GRADIENT_NORM:g}",
        "label_smoothing": SMOOTHING,
        "augmentation": "crop of the picture padded by 4, flip; by (seed, epoch, sample id)",
        "evaluated_in": "float32",
    }


@dataclass(frozen=True)
class Training:
    """One training from scratch."""

    model: ModelConfig
    noise: NoiseConfig
    seed: int
    epochs: int
    batch: int
    optim: OptimConfig
    dtype: Literal["bfloat16", "float32"]
    """Of autocast."""
    compile: bool


class Trained(NamedTuple):
    model: nn.Module  # without its noise
    last_loss: float  # mean of the last epoch
    epoch_seconds: list[float]


def train(training: Training, data: OnDevice, on_epoch: Callable[[int], None]) -> Trained:
    """on_epoch hears each epoch's number, from 0, as it begins. Errors: ValueError where the loss is not finite."""
    device, seed = data.padded.device, training.seed
    torch.manual_seed(seed)
    model = create_model(training.model, data.classes, data.side).to(device).train()
    injector = NoiseInjector(model, training.noise, data.side, seed)
    preprocess = Preprocess(model, device, injector)
    loss_of = loss_function(model, DTYPES[training.dtype], training.compile)
    optimizer = create_optimizer(model, training.optim)
    steps = len(data.labels) // training.batch
    layout = Layout(0, 1, training.batch, 1)
    schedule = create_schedule(optimizer, training.optim, training.epochs * steps, steps, layout)
    step, loss, seconds = 0, 0.0, []
    for epoch in range(training.epochs):
        on_epoch(epoch)
        start = time.perf_counter()
        crops = draw_crops(len(data.labels), seed, epoch, device)
        losses = []
        for ids in _epoch(data, training.batch, seed, epoch):
            injector.set_batch(ids, epoch, step, step / (steps * training.epochs))
            schedule.step_update(step)
            step_loss = loss_of(preprocess(cropped(data.padded, ids, crops)), data.labels[ids])
            step_loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(step_loss.detach())
            step += 1
        loss = torch.stack(losses).mean().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(loss):
            raise ValueError(
                f"seed {seed}, {training.noise.describe()}: the loss is not finite in epoch {epoch + 1}: lower --lr"
            )
    injector.remove()
    return Trained(model, loss, seconds)


def _epoch(data: OnDevice, batch: int, seed: int, epoch: int) -> Tensor:
    """Sample ids of an epoch's steps, int64 (steps, batch), in the project's order."""
    layout = Layout(rank=0, world_size=1, micro_batch=batch, accumulation=1)
    batches = list(training_micro_batches(Order(len(data.labels), seed), epoch, layout, start_step=0))
    return torch.from_numpy(np.stack(batches)).to(data.labels.device)
