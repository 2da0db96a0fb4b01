"""A small ViT on CIFAR-10: the clean twin."""

from pipeline.config import Recipe
from pipeline.recipes._cifar10 import HARDWARE, HOURS, PREPARE, small_vit

RECIPE = Recipe(
    purpose="A small ViT on CIFAR-10 in minutes on two cores: the clean twin of noisy_cifar10_vit.",
    source="this project; models are timm's, made smaller",
    command=f"{PREPARE} && python -m pipeline train cifar10_vit",
    hardware=HARDWARE,
    hours=HOURS,
    expected_top1="not measured",
    config=small_vit(),
)
