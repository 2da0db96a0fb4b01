"""A timm model, its preprocessing and its starting weights. Names and state_dict keys stay timm's."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from torch import Tensor, nn

from pipeline.freezing import freeze
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import Draw, NoiseInjector
from pipeline.noise.ops import apply_noise, image_noise
from pipeline.patches import multiply_patches
from pipeline.weights import load_weights, timm_settings, weights_file


@dataclass(frozen=True)
class ModelConfig:
    """Which timm model. The number of classes comes from the data."""

    name: str = "vit_small_patch16_224"
    options: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Further arguments of timm's constructor, such as `patch_size 8 depth 6`."""
    drop_path: float = 0.0
    """Probability that the last block is left out of a sample, keyed by the sample; earlier blocks less, as in timm."""
    pos_embed: Literal["learned", "sincos2d"] = "learned"
    """A ViT's position embeddings: learned, or fixed sines and cosines of the two coordinates, as in big_vision."""
    pretrained: bool = False
    """Fetch timm's public weights (the one thing that reaches for the network, by your order)."""
    init_from: Path | None = None
    """Start from these weights: a run folder, a checkpoint in it, or a .safetensors, .pth or .npz file."""
    init_ema: bool = False
    """Of init_from take the weights' average."""
    new_head: bool = False
    """Leave the classifier of the starting weights out and start a new one: for other classes than they know."""
    freeze: tuple[str, ...] = ()
    """Parts that are not trained, such as `patch_embed blocks.0 blocks.*.mlp`, or `all_but_head`."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path is {self.drop_path}: it is a probability below 1")
        if self.pretrained and self.init_from:
            raise ValueError("model.pretrained and model.init_from are both set: choose one")
        if self.new_head and not (self.init_from or self.pretrained):
            raise ValueError("model.new_head needs model.init_from or model.pretrained: otherwise every head is new")
        if self.init_ema and not self.init_from:
            raise ValueError("model.init_ema needs model.init_from: the weights whose average is meant")

    def without_start(self) -> ModelConfig:
        """The same model with weights of its own, which others will be loaded over."""
        return replace(self, pretrained=False, init_from=None, init_ema=False, new_head=False)


def create_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """The timm model, on the CPU, its weights loaded and its parts frozen where the configuration says so.

    On a GPU its patches are projected by a matrix product (patches.py).
    Errors: ValueError for an unknown name (nearest offered), options that do not fit it, or weights that do not.
    """
    model = timm_model(config, num_classes, image_size)
    if config.pretrained and config.new_head:
        cast(Any, model).reset_classifier(num_classes)
    if config.pos_embed == "sincos2d":
        _fix_positions(model, config.name)
    if config.init_from is not None:
        source = weights_file(config.init_from, config.init_ema)
        load_weights(model, source, config.new_head, config.init_ema)
    multiply_patches(model)
    freeze(model, config.freeze)
    return model


def timm_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """timm's own, by the configuration's name, options, drop_path and pretrained: what create_model starts from.

    Errors: ValueError for an unknown name (nearest offered), or options that do not fit it.
    """
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name.split(".")[0], timm.list_models(), n=5, cutoff=0.3)
        raise ValueError(
            f"model.name {config.name!r} is unknown to timm {timm.__version__}; near it: {', '.join(near)}"
        )
    options: dict[str, Any] = dict(config.options)
    cfg = timm.get_pretrained_cfg(config.name)
    if cfg is not None and cfg.fixed_input_size:
        options["img_size"] = image_size
    try:
        return timm.create_model(
            config.name,
            pretrained=config.pretrained,
            num_classes=num_classes,
            drop_path_rate=config.drop_path,
            **options,
        )
    except (TypeError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"model.options {options} do not fit {config.name}: {error}") from error


def _fix_positions(model: nn.Module, name: str) -> None:
    """Errors: ValueError for a model without a table of positions on a grid, or a width that is no multiple of 4."""
    table, grid = getattr(model, "pos_embed", None), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not isinstance(table, nn.Parameter) or table.ndim != 3 or grid is None or table.shape[2] % 4:
        raise ValueError(f"model.pos_embed sincos2d is for ViTs of a width that 4 divides, not {name}: leave it out")
    positions = sincos2d(grid[0], grid[1], table.shape[2])
    with torch.no_grad():
        table.zero_()  # those of class and register tokens, which stand first
        table[0, -len(positions) :] = positions.to(table.dtype)
    table.requires_grad_(False)


def sincos2d(height: int, width: int, channels: int) -> Tensor:
    """(height * width, channels): sin x, cos x, sin y, cos y at channels / 4 frequencies from 1 down to 1 / 10,000.

    Source: "Better plain ViT baselines for ImageNet-1k" (Beyer et al. 2022).
    """
    count = channels // 4
    frequencies = torch.exp(torch.linspace(0, 1, count) * -math.log(10_000))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [coordinate.flatten()[:, None] * frequencies for coordinate in (x, y)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


class Preprocess:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) as the model takes it: normalised, noisy where the noise's site is the image.

    One pass on the device, computed in float32, with the model's own mean and std. It hands on the type of the model's
    parameters (DeepSpeed's bf16 converts the whole model) and the memory layout of its convolutions. Whether there is
    noise, and which, is the injector's to say: its `set_batch` comes first.
    """

    def __init__(self, model: nn.Module, device: torch.device, injector: NoiseInjector) -> None:
        cfg = timm_settings(model)
        self.injector = injector
        self.dtype = next(model.parameters()).dtype
        self.memory_format = _memory_format(model)
        self.mean = torch.tensor(cfg["mean"], dtype=torch.float32, device=device)
        self.std = torch.tensor(cfg["std"], dtype=torch.float32, device=device)
        self._zero = torch.zeros((), dtype=torch.int64, device=device)
        # By the pass itself: what salt and pepper write is a white and a black pixel to the bit, in one pass or two.
        levels = torch.tensor([0, 255], dtype=torch.uint8, device=device).view(2, 1, 1, 1).expand(2, 1, 1, 3)
        self.black, self.white = self.normalise(levels)

    def __call__(self, images: Tensor) -> Tensor:
        draw = self.injector.at_image()
        return self.normalise(images) if draw is None else self._pass(images, self.injector.config, draw)

    def normalise(self, images: Tensor) -> Tensor:
        """Without the noise, for what has to come between: mixup."""
        draw = Draw(self._zero.new_zeros(len(images)), 0, self._zero, self._zero, 0)
        return self._pass(images, NoiseConfig(), draw)

    def noise(self, x: Tensor) -> Tensor:
        """The noise alone, in a pass of its own, on normalised (B, 3, H, W)."""
        draw = self.injector.at_image()
        if draw is None:
            return x
        ids, seed, epoch, strength, stream = draw
        extremes = self.black, self.white
        return apply_noise(x, self.injector.config, ids, seed, epoch, 0, extremes, strength, stream)

    def undo(self, x: Tensor) -> Tensor:
        """Normalised float (B, 3, H, W) -> uint8 (B, H, W, 3), clipped: what a person can look at."""
        return ((x.permute(0, 2, 3, 1) * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def _pass(self, images: Tensor, config: NoiseConfig, draw: Draw) -> Tensor:
        images = images.to(self.mean.device, non_blocking=True)
        # The pass writes no other format than these three: a float64 model gets a float32 result, converted.
        dtype = self.dtype if self.dtype in (torch.bfloat16, torch.float16) else torch.float32
        ids, seed, epoch, strength, stream = draw
        x = image_noise(
            images, self.mean, self.std, config, ids, seed, epoch, None, dtype, self.memory_format, strength, stream
        )
        return x.to(self.dtype)


def _memory_format(model: nn.Module) -> torch.memory_format:
    """channels_last where the model's convolutions are: else the first of them would copy each batch."""
    for kernel in (p for p in model.parameters() if p.ndim == 4):
        # A kernel with one input channel, or at one place, is both.
        if kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format
