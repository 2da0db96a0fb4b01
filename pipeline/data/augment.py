"""Augmentation keyed by (seed, epoch, sample id): the same picture for 1 rank or 512, before and after a crash.

Crop and flip are drawn from Philox, so that every reader (tar or .beton, Python or native) takes the same box.
RandAugment, 3-Augment and colour jitter are timm's and torchvision's; they draw from global generators, so these are
seeded from Philox for each sample and restored. What happens to whole batches on the device is in mixing.py.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from torchvision.transforms import ColorJitter

from pipeline.noise.reference import Purpose, random_words, stream_of, uniforms

_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_WORDS_PER_ATTEMPT = 4
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class AugmentConfig:
    """What is made of a picture in training, and how it is resized and cropped in evaluation."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the picture's area that a training crop takes."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    randaugment: str | None = None
    """timm's RandAugment string, such as `rand-m9-mstd0.5-inc1`: Python does it, in processes."""
    three_augment: bool = False
    """DeiT-III's 3-Augment, by timm: each picture is made grey, solarised or blurred. Python does it, in processes."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation change by up to this share, at the end. Python does it, in processes."""
    erasing: float = 0.0
    """Probability of timm's random erasing: a box of 2 to 33 % of the normalised picture, before pictures are mixed."""
    erasing_fill: Literal["const", "rand", "pixel"] = "pixel"
    """timm's modes: the mean colour, one random colour, or normal noise in each pixel."""
    mixup_alpha: float = 0.0
    """Mixup's Beta(alpha, alpha), by pairs of neighbours in the global order; 0 is off."""
    cutmix_alpha: float = 0.0
    """CutMix's Beta(alpha, alpha), by the same pairs; 0 is off."""
    mixup_prob: float = 1.0
    """Probability that a pair is mixed, by either."""
    switch_prob: float = 0.5
    """Where both are on: probability that a pair is mixed by CutMix."""
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
            if self.three_augment:
                raise ValueError("augment.randaugment and augment.three_augment are both set: choose one")
            try:
                _policy(self, 224)
            except (AssertionError, ValueError, KeyError, IndexError) as error:
                raise ValueError(
                    f"augment.randaugment is {self.randaugment!r}, which timm does not take ({error}): "
                    "give one like rand-m9-mstd0.5-inc1"
                ) from error
        for name in ("flip", "color_jitter", "erasing", "mixup_prob", "switch_prob"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                kind = "share" if name == "color_jitter" else "probability"
                raise ValueError(f"augment.{name} is {value}: it is a {kind} from 0 to 1")
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"augment.{name} is {value}: a number from 0")
        if not 0 < self.eval_crop_share <= 1:
            raise ValueError(f"augment.eval_crop_share is {self.eval_crop_share}: above 0, at most 1")

    @property
    def changes_colours(self) -> bool:
        """Whether Python has something to do after crop and flip, for which threads would wait for one another."""
        return self.randaugment is not None or self.three_augment or self.color_jitter > 0

    @property
    def mixes_samples(self) -> bool:
        """Whether pictures are mixed in pairs, which a micro-batch must not cut."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def for_evaluation(self) -> AugmentConfig:
        """The same evaluation, without what only training does: threads can read it."""
        return replace(self, randaugment=None, three_augment=False, color_jitter=0.0)


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
    return uniforms(image_words(sample_ids, seed, epoch, purpose, count), torch.float64).numpy()


def image_words(sample_ids: np.ndarray, seed: int, epoch: int, purpose: Purpose, count: int) -> torch.Tensor:
    """The first `count` words of each sample for one purpose: int64 (B, count), each entry in [0, 2^32)."""
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


def apply_colours(image: Image.Image, sample_id: int, seed: int, epoch: int, config: AugmentConfig) -> Image.Image:
    """RandAugment or 3-Augment, then colour jitter, on a picture that is cropped and flipped, as timm has them."""
    if not config.changes_colours:
        return image
    words = image_words(np.array([sample_id]), seed, epoch, Purpose.COLOUR, 3)[0].tolist()
    with _seeded_globals(*words):
        for transform in _policy(config, image.width):
            image = transform(image)
    return image


@lru_cache(maxsize=4)
def _policy(config: AugmentConfig, size: int) -> tuple[Callable[[Image.Image], Image.Image], ...]:
    options = {"translate_const": int(size * 0.45), "img_mean": (124, 116, 104)}
    transforms: list[Callable[[Image.Image], Image.Image]] = []
    if config.randaugment is not None:
        transforms.append(rand_augment_transform(config.randaugment, options))
    if config.three_augment:
        transforms.append(auto_augment_transform("3a", options))
    if config.color_jitter:
        transforms.append(ColorJitter(*(config.color_jitter,) * 3))
    return tuple(transforms)


@contextlib.contextmanager
def _seeded_globals(python_seed: int, numpy_seed: int, torch_seed: int) -> Iterator[None]:
    """What timm and torchvision read: seeds `random`, `numpy.random` and torch's, and leaves them as they were."""
    # Not torch.manual_seed: it would reach for the GPU too, in a forked process.
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    torch.default_generator.manual_seed(torch_seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


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
