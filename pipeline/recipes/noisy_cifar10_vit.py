"""A small NoisyViT on CIFAR-10."""

from dataclasses import replace
from pathlib import Path

from pipeline.config import Recipe
from pipeline.recipes._cifar10 import HARDWARE, HOURS, PREPARE, at_the_last, small_vit

RECIPE = Recipe(
    purpose="A small NoisyViT on CIFAR-10 in minutes on two cores, the circular shift in its last block in training.",
    source="this project; models are timm's, made smaller",
    command=f"{PREPARE} && python -m pipeline train noisy_cifar10_vit",
    hardware=HARDWARE,
    hours=HOURS,
    expected_top1="not measured",
    config=replace(small_vit(), run=Path("runs/cifar10/noisy_vit"), noise=at_the_last("blocks.3.attn")),
)
