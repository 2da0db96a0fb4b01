"""What happens to a batch of normalised pictures on the device: random erasing, then Mixup and CutMix.

The arithmetic is timm's (timm.data.RandomErasing; timm.data.Mixup in its mode `pair`). The draws are not: they are
keyed by (seed, epoch, sample id), and a pair is two neighbours of the global order, so that nothing depends on the
number of ranks or on the micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment import AugmentConfig, image_words
from pipeline.noise.ops import gaussian_noise
from pipeline.noise.reference import Purpose, stream_of, uniforms

_FILL_STREAM = stream_of("erased", Purpose.NOISE)  # not the image's: noise comes over what was erased

# timm's defaults: share of the area that is erased, lowest aspect ratio (the highest is its inverse), attempts.
_ERASED_AREA, _ERASED_ASPECT, _ERASING_ATTEMPTS = (0.02, 1 / 3), 0.3, 10


class Box(NamedTuple):
    """Rows `top` to `bottom`, columns `left` to `right`, both ends excluded."""

    top: int
    bottom: int
    left: int
    right: int


class Pair(NamedTuple):
    """How two neighbours are mixed: each keeps `share` of itself, by pixel (Mixup) or by area (CutMix, in the box)."""

    share: float
    box: Box | None


# ---- Mixup and CutMix ----


def targets_of(labels: Tensor, num_classes: int, label_smoothing: float = 0.0) -> Tensor:
    """int64 (B,) -> float32 (B, num_classes): one for the class, `label_smoothing` of it shared among all, as timm."""
    off = label_smoothing / num_classes
    shape = len(labels), num_classes
    return torch.full(shape, off, device=labels.device).scatter_(1, labels[:, None], 1 - label_smoothing + off)


def mix(
    images: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    seed: int,
    epoch: int,
    config: AugmentConfig,
    num_classes: int,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of neighbours 2j and 2j + 1 of the global order.

    images: float (B, 3, H, W), left as they are; labels: int64 (B,), on their device; sample_ids: int64 (B,), best on
    the CPU, where the draws are made; B even where anything is mixed. Returns images and float32 targets
    (B, num_classes), smoothed before they are mixed. A pair's draws are keyed by its first sample.
    """
    targets = targets_of(labels, num_classes, label_smoothing)
    if not config.mixes_samples:
        return images, targets
    assert len(images) % 2 == 0, "a micro-batch cut a pair"
    pairs = draw_pairs(sample_ids[0::2], seed, epoch, config, images.shape[2:])
    partner = torch.arange(len(images), device=images.device) ^ 1
    kept = _kept(pairs, images)
    share = _to([[pair.share] for pair in pairs], images.device, torch.float32).repeat_interleave(2, 0)
    mixed = kept * images + (1 - kept) * images[partner]
    return mixed, share * targets + (1 - share) * targets[partner]


def draw_pairs(first_ids: Tensor, seed: int, epoch: int, config: AugmentConfig, size: Sequence[int]) -> list[Pair]:
    """For each pair, by the id of its first sample, int64 (B / 2,); size: (height, width) of the pictures."""
    words = image_words(first_ids.cpu().numpy(), seed, epoch, Purpose.MIXUP, 5)
    draws = uniforms(words, torch.float64).numpy()
    pairs = []
    for word, (_, whether, which, row, column) in zip(words[:, 0].tolist(), draws, strict=True):
        by_box = config.cutmix_alpha > 0 and (config.mixup_alpha == 0 or which <= config.switch_prob)
        alpha = config.cutmix_alpha if by_box else config.mixup_alpha
        share = np.random.RandomState(word).beta(alpha, alpha)
        if whether > config.mixup_prob:
            pairs.append(Pair(1.0, None))
        elif by_box:
            box = cutmix_box(share, row, column, size)
            area = (box.bottom - box.top) * (box.right - box.left)
            pairs.append(Pair(1 - area / (size[0] * size[1]), box))  # of the box as the edges have cut it
        else:
            pairs.append(Pair(share, None))
    return pairs


def cutmix_box(share: float, row: float, column: float, size: Sequence[int]) -> Box:
    """timm's box of 1 - share of the area, cut at the picture's edges; row, column: its centre, drawn from (0, 1]."""
    sides = [int(side * math.sqrt(1 - share)) for side in size]
    ends = []
    for draw, side, cut in zip((row, column), size, sides, strict=True):
        centre = min(int(draw * side), side - 1)
        ends += [max(centre - cut // 2, 0), min(centre + (cut + 1) // 2, side)]
    return Box(*ends)


def _kept(pairs: list[Pair], images: Tensor) -> Tensor:
    """What each picture keeps of itself, by pixel: (B, 1, 1, 1), or (B, 1, H, W) where a box is among the pairs."""
    shares = [[[[1.0 if pair.box else pair.share]]] for pair in pairs]
    kept = _to(shares, images.device, images.dtype)
    if any(pair.box for pair in pairs):
        boxes = [pair.box or Box(0, 0, 0, 0) for pair in pairs]
        kept = kept.where(~_inside(boxes, images), 0)
    return kept.repeat_interleave(2, 0)


def _inside(boxes: list[Box], images: Tensor) -> Tensor:
    """bool (number of boxes, 1, H, W)."""
    top, bottom, left, right = _to(boxes, images.device, torch.int64).T[:, :, None]
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    in_rows, in_columns = (top <= rows) & (rows < bottom), (left <= columns) & (columns < right)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _to(numbers: list, device: torch.device, dtype: torch.dtype) -> Tensor:
    """By a copy that a GPU is not waited for."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


# ---- random erasing ----


def erase(images: Tensor, sample_ids: Tensor, seed: int, epoch: int, config: AugmentConfig) -> Tensor:
    """Random erasing (Zhong et al. 2017) of normalised pictures, float (B, 3, H, W), which are left as they are.

    sample_ids: int64 (B,), best on the CPU. What a picture gets is a function of (seed, epoch, sample id).
    """
    drawn = draw_erased(sample_ids, seed, epoch, config, images.shape[2:]) if config.erasing else {}
    if not drawn:
        return images
    hit = list(drawn)
    noise = torch.zeros((len(hit), *images.shape[1:]), dtype=images.dtype, device=images.device)
    if config.erasing_fill != "const":
        if config.erasing_fill == "rand":
            noise = noise[:, :, :1, :1].contiguous()
        ids = sample_ids[hit].to(images.device, non_blocking=True)
        noise = gaussian_noise(noise, 1.0, ids, seed, torch.tensor(epoch), _FILL_STREAM)
    erased = images.clone()
    erased[hit] = torch.where(_inside(list(drawn.values()), images), noise, images[hit])
    return erased


def draw_erased(
    sample_ids: Tensor, seed: int, epoch: int, config: AugmentConfig, size: Sequence[int]
) -> dict[int, Box]:
    """The boxes that are erased, by the rows of the batch; size: (height, width) of the pictures."""
    count = 1 + 4 * _ERASING_ATTEMPTS
    words = image_words(sample_ids.cpu().numpy(), seed, epoch, Purpose.ERASE, count)
    draws = uniforms(words, torch.float64).numpy()
    boxes = {}
    for row in np.flatnonzero(draws[:, 0] <= config.erasing).tolist():
        box = erased_box(draws[row, 1:].reshape(-1, 4), size)
        if box is not None:
            boxes[row] = box
    return boxes


def erased_box(attempts: np.ndarray, size: Sequence[int]) -> Box | None:
    """timm's rule: the first attempt that gives a box smaller than the picture; attempts: (n, 4) in (0, 1]."""
    height, width = size
    low, high = _ERASED_AREA
    for area_draw, ratio_draw, top_draw, left_draw in attempts:
        area = height * width * (low + (high - low) * area_draw)
        ratio = math.exp(math.log(_ERASED_ASPECT) * (1 - 2 * ratio_draw))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            # A draw of exactly 1 would lie one past the last place.
            top = min(int(top_draw * (height - h + 1)), height - h)
            left = min(int(left_draw * (width - w + 1)), width - w)
            return Box(top, top + h, left, left + w)
    return None
