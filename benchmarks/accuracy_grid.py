"""The grid of the paper's tables: noise x site x strength x when it acts, for any timm ViT or ResNet.

A site is a word, since modules have other names in other models:

| word | ViT | ResNet |
| --- | --- | --- |
| image | the normalised picture | likewise |
| embedding | the input of the first block | likewise, behind the stem |
| blockI | before qkv of block I (`blocks.I.attn`, the official kind of place) | the input of residual block I |
| last | blockI of the last block: the official place | likewise |
| random | one of the blocks, drawn in each step; in evaluation one for all | likewise |
| residual | the residual stream into the last block, all tokens | what `last` is already |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from pipeline.models import ModelConfig
from pipeline.noise.config import IMAGE_SITE, During, NoiseConfig

NoiseName = Literal["gaussian", "salt_and_pepper", "circular_shift", "optimal_q"]
SITES = ("image", "embedding", "last", "random", "residual")
_BLOCK = re.compile(r"block(\d+)")
_STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Model:
    """A model of the grid: a timm name and what follows it, such as `resnet18` or `vit_tiny_patch16_224:depth=4`."""

    text: str

    @property
    def config(self) -> ModelConfig:
        """Errors: ValueError for options that are no NAME=VALUE."""
        name, _, options = self.text.partition(":")
        found: dict[str, int | float | bool | str] = {}
        for pair in filter(None, options.split(",")):
            key, equals, value = pair.partition("=")
            if not equals or not key:
                raise ValueError(f"--models {self.text}: {pair!r} is no NAME=VALUE, as in vit_tiny_patch16_224:depth=4")
            found[key] = _number(value)
        return ModelConfig(name, found)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class Point:
    """A noise of the grid."""

    kind: NoiseName
    strength: float | None
    site: str
    """The word; the module's name is in the NoiseConfig."""


def points(
    kinds: Sequence[NoiseName], strengths: dict[NoiseName, tuple[float, ...]], sites: Sequence[str]
) -> Iterator[Point]:
    """Every noise at every site with every strength that it has."""
    for site in sites:
        for kind in kinds:
            for strength in strengths.get(kind) or (None,):
                yield Point(kind, strength, site)


def noise_of(point: Point, model: nn.Module, during: During, group_size: int) -> NoiseConfig | None:
    """None where the model has no such site of its own. Errors: ValueError for a word that is none, or no block."""
    place = _place(point.site, model)
    if place is None:
        return None
    return NoiseConfig(
        kind=point.kind,
        strength=point.strength,
        site=place,
        during=during,
        group_size=group_size,
        spare_prefix_tokens=point.site != "residual",
        pick="random_one" if point.site == "random" else "all",
    )


def _place(word: str, model: nn.Module) -> str | None:
    if word == "image":
        return IMAGE_SITE
    blocks = block_names(model)
    inside = ".attn" if blocks[0].startswith("blocks.") else ""
    if word == "embedding":
        return blocks[0]
    if word == "last":
        return f"{blocks[-1]}{inside}"
    if word == "random":
        return ",".join(f"{name}{inside}" for name in blocks)
    if word == "residual":
        return blocks[-1] if inside else None
    found = _BLOCK.fullmatch(word)
    if found is None:
        raise ValueError(f"site {word!r} is none of {', '.join(SITES)} or blockI, such as block3")
    if (number := int(found[1])) >= len(blocks):
        raise ValueError(f"site {word!r}: {type(model).__name__} has block0 to block{len(blocks) - 1}")
    return f"{blocks[number]}{inside}"


def block_names(model: nn.Module) -> list[str]:
    """The blocks of a ViT, or the residual blocks of a ResNet. Errors: ValueError for any other model."""
    modules = dict(model.named_modules())
    if isinstance(blocks := modules.get("blocks"), nn.Sequential) and f"blocks.{len(blocks) - 1}.attn" in modules:
        return [f"blocks.{number}" for number in range(len(blocks))]
    stages = [(name, stage) for name in _STAGES if isinstance(stage := modules.get(name), nn.Sequential)]
    if not stages:
        raise ValueError(
            f"--models: {type(model).__name__} is neither a ViT nor a ResNet of timm's, whose blocks are known"
        )
    return [f"{name}.{number}" for name, stage in stages for number in range(len(stage))]
