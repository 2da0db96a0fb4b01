"""Augmentation keyed by (seed, epoch, sample id): the same picture for 1 rank or 512, before and after a crash.

Crop and flip are drawn from Philox, so that every reader (tar or .beton, Python or native) takes the same box.
RandAugment is timm's; it draws from global generators, so these are seeded from Philox for each sample and restored.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from pipeline.noise.reference import Purpose, random_words, stream_of, uniforms

_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_WORDS_PER_ATTEMPT = 4
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class AugmentConfig:
    """RandomResizedCrop, flip, RandAugment and mixup for training; resize and crop for evaluation."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the picture's area that a training crop takes."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    randaugment: str | None = None
    """timm's RandAugment string, such as `rand-m9-mstd0.5-inc1`: Python does it, in processes."""
    mixup_alpha: float = 0.0
    """Mixup's Beta(alpha, alpha), by pairs of neighbours in the global order; 0 is off."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    eval_crop: Literal["center", "squash"] = "center"
    """`center`: short side resized, then the middle; `squash`: the whole picture, as the official NoisyNN code."""
    eval_crop_share: float = 0.9
    """Side of the middle crop over the short side, timm's crop_pct."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"augment.scale is {self.scale}: two shares of the area, 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"augment.ratio is {self.ratio}: two aspect ratios, 0 < low <= high")
        if self.randaugment is not None:
            try:
                _randaugment(self.randaugment, 224)
            except (AssertionError, ValueError, KeyError, IndexError) as error:
                raise ValueError(
                    f"augment.randaugment is {self.randaugment!r}, which timm does not take ({error}): "
                    "give one like rand-m9-mstd0.5-inc1"
                ) from error
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augment.flip is {self.flip}: it is a probability from 0 to 1")
        if not 0 <= self.mixup_alpha < math.inf:
            raise ValueError(f"augment.mixup_alpha is {self.mixup_alpha}: a number from 0")
        if not 0 < self.eval_crop_share <= 1:
            raise ValueError(f"augment.eval_crop_share is {self.eval_crop_share}: above 0, at most 1")


class Crop(NamedTuple):
    """A box in pixels of the original picture, and whether it is mirrored."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


def training_crops(
    sizes: list[tuple[int, int]], sample_ids: np.ndarray, seed: int, epoch: int, config: AugmentConfig
) -> list[Crop]:
    """RandomResizedCrop's box for each picture; sizes: (width, height) of each, in the order of sample_ids."""
    draws = _uniforms(sample_ids, seed, epoch, Purpose.CROP, _CROP_ATTEMPTS * _WORDS_PER_ATTEMPT)
    flips = _uniforms(sample_ids, seed, epoch, Purpose.FLIP, 1)[:, 0] <= config.flip
    attempts = draws.reshape(len(sizes), _CROP_ATTEMPTS, _WORDS_PER_ATTEMPT)
    boxes = [_box(width, height, own, config) for (width, height), own in zip(sizes, attempts, strict=True)]
    return [Crop(*box, bool(flip)) for box, flip in zip(boxes, flips, strict=True)]


def _uniforms(sample_ids: np.ndarray, seed: int, epoch: int, purpose: Purpose, count: int) -> np.ndarray:
    """float64 (B, count) in (0, 1]."""
    return uniforms(_words(sample_ids, seed, epoch, purpose, count), torch.float64).numpy()


def _words(sample_ids: np.ndarray, seed: int, epoch: int, purpose: Purpose, count: int) -> torch.Tensor:
    ids = torch.as_tensor(sample_ids, dtype=torch.int64)
    return random_words(count, ids, seed, torch.tensor(epoch), stream_of("image", purpose))


def _box(width: int, height: int, attempts: np.ndarray, config: AugmentConfig) -> tuple[int, int, int, int]:
    """(left, top, width, height). The rule of torchvision's RandomResizedCrop; attempts: (10, 4) in (0, 1]."""
    low, high = config.scale
    log_low, log_high = math.log(config.ratio[0]), math.log(config.ratio[1])
    for area_draw, ratio_draw, left_draw, top_draw in attempts:
        area = width * height * (low + (high - low) * area_draw)
        ratio = math.exp(log_low + (log_high - log_low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            # A draw of exactly 1 would lie one past the last place.
            left = min(int(left_draw * (width - w + 1)), width - w)
            top = min(int(top_draw * (height - h + 1)), height - h)
            return left, top, w, h
    # No box fitted (an extreme aspect ratio): the largest central one of an allowed ratio.
    w = min(width, max(1, round(height * config.ratio[1])))
    h = min(height, max(1, round(width / config.ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def apply_training(image: Image.Image, crop: Crop, size: int, config: AugmentConfig) -> Image.Image:
    """Crop, antialiased resize to (size, size), flip.

    Cropped first, as torchvision does: Pillow's resize with a box would mix in pixels from outside of it.
    """
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    image = image.crop(box).resize((size, size), _RESAMPLING[config.interpolation])
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else image


def apply_randaugment(image: Image.Image, sample_id: int, seed: int, epoch: int, config: AugmentConfig) -> Image.Image:
    if config.randaugment is None:
        return image
    words = _words(np.array([sample_id]), seed, epoch, Purpose.COLOUR, 2)[0].tolist()
    with _seeded_globals(*words):
        return _randaugment(config.randaugment, image.width)(image)


@lru_cache(maxsize=4)
def _randaugment(spec: str, size: int):
    return rand_augment_transform(spec, {"translate_const": int(size * 0.45), "img_mean": (124, 116, 104)})


@contextlib.contextmanager
def _seeded_globals(python_seed: int, numpy_seed: int) -> Iterator[None]:
    """timm's RandAugment reads `random` and `numpy.random`: seeds both, and leaves them as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@lru_cache(maxsize=4)
def evaluation_transform(config: AugmentConfig, size: int):
    """timm's own evaluation transform, Pillow image -> uint8 (3, size, size): top-1 compares with timm's."""
    return timm.data.create_transform(
        input_size=size,
        is_training=False,
        use_prefetcher=True,  # leaves the picture uint8: normalising happens on the device
        interpolation=config.interpolation,
        crop_pct=config.eval_crop_share if config.eval_crop == "center" else 1.0,
        crop_mode=config.eval_crop,
    )


def mixup(
    images: torch.Tensor, targets: torch.Tensor, sample_ids: torch.Tensor, seed: int, epoch: int, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (Zhang et al. 2018) of neighbours 2j and 2j+1 of the global order, one coefficient a pair.

    images: float (B, 3, H, W); targets: float (B, classes); B even, so that a pair never spans two micro-batches and
    the result does not depend on the number of ranks. The coefficient is keyed by the pair's first sample.
    """
    first = sample_ids[0::2].repeat_interleave(2).cpu().numpy()
    words = _words(first[0::2], seed, epoch, Purpose.MIXUP, 1)[:, 0].tolist()
    lam = [np.random.RandomState(word).beta(alpha, alpha) for word in words]
    weight = torch.tensor(lam, dtype=images.dtype, device=images.device).repeat_interleave(2)
    partner = torch.arange(len(images), device=images.device) ^ 1
    w = weight.view(-1, 1, 1, 1)
    mixed_images = w * images + (1 - w) * images[partner]
    mixed_targets = weight[:, None] * targets + (1 - weight[:, None]) * targets[partner]
    return mixed_images, mixed_targets
