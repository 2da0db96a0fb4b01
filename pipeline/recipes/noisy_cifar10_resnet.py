"""A small NoisyCNN on CIFAR-10."""

from dataclasses import replace
from pathlib import Path

from pipeline.config import Recipe
from pipeline.recipes._cifar10 import HARDWARE, HOURS, PREPARE, at_the_last, small_resnet

RECIPE = Recipe(
    purpose="A small NoisyCNN on CIFAR-10 in minutes on two cores, the circular shift at its last block in training.",
    source="this project; models are timm's, made smaller",
    command=f"{PREPARE} && python -m pipeline train noisy_cifar10_resnet",
    hardware=HARDWARE,
    hours=HOURS,
    expected_top1="not measured",
    config=replace(small_resnet(), run=Path("runs/cifar10/noisy_resnet"), noise=at_the_last("layer4.0")),
)
