"""What noise costs a model: a step of ViT-S, forward and backward, with noise at all its blocks and without."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Contestant
from benchmarks.noise_contestants import GROUP, STRENGTHS, kernels_text
from benchmarks.training_step import loss_function, wait_for
from pipeline.models import ModelConfig, create_model
from pipeline.noise.config import Kind, NoiseConfig
from pipeline.noise.inject import NoiseInjector

CLASSES, IMAGE_SIZE = 1000, 224
SITE = "blocks.*.attn"
STEPS = 10  # of a round
KINDS: tuple[Kind, ...] = ("none", "gaussian", "optimal_q")


def step_contestants(
    batch: int, device: torch.device, model: str = "vit_small_patch16_224", compiled: bool = True
) -> list[Contestant]:
    """The plain model first. An item is a picture; autocast to bfloat16, no optimiser.

    The losses that their first steps give are not compared: noise changes them.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator).to(device)
    contestants = []
    for kind in KINDS:
        strength = STRENGTHS.get(kind)
        config = NoiseConfig(kind=kind, strength=strength, site=SITE, group_size=GROUP)
        noise = f"{config.describe()}, {kernels_text(device.type)}" if kind != "none" else "no noise"
        how = "torch.compile of model and loss" if compiled else "eager"
        step = Step(model, config, x, labels, compiled)
        contestants.append(Contestant(kind, partial(step.round, STEPS), f"{model}, {how}, bfloat16; {noise}"))
    return contestants


class Step:
    """One model; the noise at its blocks is another in each step."""

    def __init__(self, name: str, config: NoiseConfig, x: Tensor, labels: Tensor, compiled: bool) -> None:
        torch.manual_seed(0)
        with x.device:
            self.model = create_model(ModelConfig(name), CLASSES, IMAGE_SIZE).train()
        self.injector = NoiseInjector(self.model, config, IMAGE_SIZE, seed=0)
        self.loss_of = loss_function(self.model, torch.bfloat16, compiled)
        self.x, self.labels = x, labels
        self.ids = torch.arange(len(x), device=x.device)
        self.steps_done = 0

    def round(self, steps: int) -> int:
        for _ in range(steps):
            if self.injector.sites:
                self.injector.set_batch(self.ids, epoch=self.steps_done)
            self.loss_of(self.x, self.labels).backward()
            self.model.zero_grad()
            self.steps_done += 1
        wait_for(self.x.device)
        return steps * len(self.x)
