"""Figures that the NoisyNN paper publishes, to be printed beside one's own and marked as published. ImageNet top-1, %.

Source: arXiv 2309.10625. Only HEADLINES, and of the tables the linear noise of ViT-B and the gain of ResNet-50, were
seen in the official material; the rest of the tables is from secondary text, so it is marked as unchecked.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Resolution = Literal[224, 384]


class Headline(NamedTuple):
    """Top-1 on ImageNet's validation pictures, %."""

    model: str
    """timm's name."""
    plain: float
    """By ordinary evaluation."""
    noisy: float
    """Optimal Q at inference, class order, the mean over batches of the running accuracy."""


HEADLINES: dict[Resolution, Headline] = {
    224: Headline("vit_base_patch16_224.augreg_in21k_ft_in1k", 84.53, 93.87),
    384: Headline("vit_base_patch16_384.augreg_in21k_ft_in1k", 86.01, 95.65),
}

# Column of the paper's tables -> noise -> top-1 %. `linear` is the circular shift.
TABLES: dict[str, dict[str, float]] = {
    "R18": {"none": 63.90, "gaussian": 62.35, "circular_shift": 79.62, "salt_and_pepper": 55.45},
    "R34": {"none": 66.80, "gaussian": 65.40, "circular_shift": 80.05, "salt_and_pepper": 63.36},
    "R50": {"none": 70.00, "gaussian": 69.62, "circular_shift": 81.32, "salt_and_pepper": 45.89},
    "R101": {"none": 70.66, "gaussian": 70.10, "circular_shift": 81.91, "salt_and_pepper": 52.96},
    "ViT-T": {"none": 79.34, "gaussian": 79.10, "circular_shift": 80.69, "salt_and_pepper": 78.64},
    "ViT-S": {"none": 81.88, "gaussian": 81.80, "circular_shift": 87.27, "salt_and_pepper": 81.75},
    "ViT-B": {"none": 84.33, "gaussian": 83.41, "circular_shift": 89.99, "salt_and_pepper": 82.40},
    "ViT-L": {"none": 88.64, "gaussian": 85.92, "circular_shift": 88.72, "salt_and_pepper": 85.15},
}
_NAMES = {
    "resnet18": "R18",
    "resnet34": "R34",
    "resnet50": "R50",
    "resnet101": "R101",
    "vit_tiny": "ViT-T",
    "vit_small": "ViT-S",
    "vit_base": "ViT-B",
    "vit_large": "ViT-L",
}
_NEAREST = {"resnet": "R18", "vit": "ViT-T"}  # of smaller models of the family


class Published(NamedTuple):
    column: str
    """Of the paper's tables."""
    top1: float | None
    """%, on ImageNet; None where the paper has no figure."""


def published_top1(timm_name: str, kind: str) -> Published | None:
    """What the paper gives for a timm model, or the smallest of its family. None: it has none of that family."""
    column = next((own for start, own in _NAMES.items() if timm_name.split(".")[0].startswith(f"{start}_")), None)
    column = column or _NAMES.get(timm_name.split(".")[0])
    nearest = next((own for start, own in _NEAREST.items() if timm_name.startswith(start)), None)
    if (column or nearest) is None:
        return None
    return Published(column or str(nearest), TABLES[column or str(nearest)].get(kind))
