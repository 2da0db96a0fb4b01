"""A timm model, its preprocessing and its starting weights. The model is timm's own: names and state_dict keys stay."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import Draw, NoiseInjector
from pipeline.noise.ops import apply_noise, image_noise

WEIGHTS_NAME = "model.safetensors"


@dataclass(frozen=True)
class ModelConfig:
    """Which timm model. The number of classes comes from the data."""

    name: str = "vit_small_patch16_224"
    options: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Further arguments of timm's constructor, such as `patch_size 8 depth 6`."""
    drop_path: float = 0.0
    pretrained: bool = False
    """Fetch timm's public weights (the one thing that reaches for the network, by your order)."""
    init_from: Path | None = None
    """Start from these weights: a run folder, a checkpoint in it, or a .safetensors file."""
    new_head: bool = False
    """Leave the classifier of the starting weights out and start a new one: for other classes than they know."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path is {self.drop_path}: it is a probability below 1")
        if self.pretrained and self.init_from:
            raise ValueError("model.pretrained and model.init_from are both set: choose one")
        if self.new_head and not (self.init_from or self.pretrained):
            raise ValueError("model.new_head needs model.init_from or model.pretrained: otherwise every head is new")


def create_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """The timm model, on the CPU, its weights loaded where the configuration says so.

    Errors: ValueError for an unknown name (nearest offered), options that do not fit it, or weights that do not.
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
        model = timm.create_model(
            config.name,
            pretrained=config.pretrained,
            num_classes=num_classes,
            drop_path_rate=config.drop_path,
            **options,
        )
    except (TypeError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"model.options {options} do not fit {config.name}: {error}") from error
    if config.pretrained and config.new_head:
        cast(Any, model).reset_classifier(num_classes)
    if config.init_from is not None:
        load_weights(model, weights_file(config.init_from), config.new_head)
    return model


def weights_file(source: Path) -> Path:
    """The weights under a .safetensors file, a checkpoint folder, or a run folder (its latest checkpoint)."""
    from pipeline.checkpoint import latest_generation, verify_generation

    if source.is_file():
        return source
    if not source.exists():
        raise FileNotFoundError(f"no weights at {source}: name a run folder, a checkpoint in it or a .safetensors file")
    generation = latest_generation(source) if (source / "checkpoints").is_dir() else source
    if generation is None:
        raise FileNotFoundError(f"{source} holds no finished checkpoint: train there first, or name another")
    verify_generation(generation)
    return generation / WEIGHTS_NAME


def load_weights(model: nn.Module, path: Path, new_head: bool = False) -> None:
    """Loads timm-named safetensors strictly; `new_head` leaves the classifier as it was made.

    Errors: ValueError naming the first tensors that do not fit, and the mend.
    """
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    own = model.state_dict()
    head = _classifier_keys(model)
    if new_head:
        weights = {k: v for k, v in weights.items() if k not in head}
    missing = sorted(own.keys() - weights.keys() - (head if new_head else set()))
    unexpected = sorted(weights.keys() - own.keys())
    shapes = [k for k in sorted(own.keys() & weights.keys()) if own[k].shape != weights[k].shape]
    if not missing and not unexpected and shapes and set(shapes) <= head:
        raise ValueError(
            f"{path} was trained on {len(weights[shapes[0]])} classes, the data has {len(own[shapes[0]])}: "
            "pass --model.new-head to start a new classifier, or take the data it was trained on"
        )
    if missing or unexpected or shapes:
        faults = [f"{len(missing)} tensors missing ({', '.join(missing[:3])})"] if missing else []
        faults += [f"{len(unexpected)} unknown ({', '.join(unexpected[:3])})"] if unexpected else []
        faults += [f"{k}: {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}" for k in shapes[:3]]
        raise ValueError(f"{path} is a checkpoint of another model: {'; '.join(faults)}. {_origin(path)}")
    model.load_state_dict(weights, strict=not new_head)


def timm_settings(model: nn.Module) -> dict[str, Any]:
    """timm's record of a model: its mean and std, the name of its classifier, and more."""
    return cast(Any, model).pretrained_cfg


def _classifier_keys(model: nn.Module) -> set[str]:
    classifier = timm_settings(model).get("classifier", "head")
    prefixes = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {k for k in model.state_dict() if k.startswith(tuple(f"{p}." for p in prefixes))}


def _origin(path: Path) -> str:
    config = path.with_name("config.json")
    if not config.is_file():
        return "Give --model.name and --model.options the values it was trained with"
    model = json.loads(config.read_text())["model"]
    return f"It was trained as --model.name {model['name']} --model.options {model['options'] or 'none'}"


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
