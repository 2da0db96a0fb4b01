"""Every noise in plain PyTorch: the specification that faster code must meet.

Randomness is an argument. Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns
(seed, epoch, stream, sample id, position) into 32-bit integers, so that a draw does not depend on the batch, the rank
or the order in which it is asked for, and nothing needs to be stored for the backward pass.

Key: (seed, epoch). Counter: (block, stream, low and high half of the sample id), where block = position within the
sample's contiguous shape // 4 and the position selects one of the block's four words.
"""

from __future__ import annotations

import hashlib
import math
from enum import IntEnum

import torch
from torch import Tensor

from pipeline.noise.config import NoiseConfig

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """Keeps apart draws for different ends at the same (seed, epoch, sample)."""

    NOISE = 0
    MASK = 1
    FLIP = 2
    CROP = 3
    SITE = 4
    ORDER = 5
    COLOUR = 6
    MIXUP = 7
    ERASE = 8
    DROP_PATH = 9


def stream_of(site: str, purpose: Purpose) -> int:
    """24 bits of the site's name, then 8 bits of purpose. Pure: it is the same in every process and version."""
    return int.from_bytes(hashlib.sha256(site.encode()).digest()[:3], "big") << 8 | purpose


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Ten rounds of Philox4x32.

    counter, key: int64 tensors holding unsigned 32-bit values, of shapes that broadcast together to `shape`.
    Returns int64 (*shape, 4), each entry in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, so both halves of the unsigned product are right after masking.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & _MASK32, (p1 >> 32) & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _MASK32, high0 ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def random_words(count: int, sample_ids: Tensor, seed: int, epoch: Tensor, stream: int) -> Tensor:
    """The first `count` words of each sample.

    sample_ids: int64 (B,); epoch: int64 scalar. Returns int64 (B, count), each entry in [0, 2^32).
    """
    device = sample_ids.device
    blocks = (count + 3) // 4
    block = torch.arange(blocks, device=device)
    ids = sample_ids[:, None]
    counter = (block, torch.tensor(stream, device=device), ids & _MASK32, (ids >> 32) & _MASK32)
    key = (torch.tensor(seed & _MASK32, device=device), epoch.to(device) & _MASK32)
    return philox4x32(counter, key).reshape(len(sample_ids), 4 * blocks)[:, :count]


def uniforms(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """32-bit words -> (0, 1], never 0, so that a logarithm can be taken."""
    return words.to(dtype) * 2.0**-32 + 2.0**-33


def normals(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Box-Muller on neighbouring pairs of words: (..., 2n) -> (..., 2n) standard normals."""
    u = uniforms(words, dtype)
    radius = torch.sqrt(-2.0 * torch.log(u[..., 0::2]))
    angle = (2.0 * math.pi) * u[..., 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)


def gaussian_noise(
    x: Tensor, std: float, sample_ids: Tensor, seed: int, epoch: Tensor, stream: int, first_token: int = 0
) -> Tensor:
    """x + N(0, std), in x's dtype; computed in float32 at least.

    x: (B, ...); sample_ids: int64 (B,); stream: stream_of the site. Tokens before `first_token` (axis 1) are left as
    they are, to the bit.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    count = math.prod(x.shape[1:])
    words = random_words(count + count % 2, sample_ids, seed, epoch, stream)
    noise = normals(words, dtype)[:, :count].reshape(x.shape)
    return _spare(x, (x.to(dtype) + std * noise).to(x.dtype), first_token)


def salt_and_pepper(
    x: Tensor,
    probability: float,
    sample_ids: Tensor,
    seed: int,
    epoch: Tensor,
    stream: int,
    group_size: int | None = None,
    first_token: int = 0,
    extremes: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Each entry becomes the highest value with probability p/2, the lowest with p/2.

    x: (B, ...). `extremes`: (lowest, highest), broadcast to x: black and white at the image. None: those of each group
    of samples, without gradient. The decision is on integers, so every implementation takes the same one.
    """
    words = random_words(math.prod(x.shape[1:]), sample_ids, seed, epoch, stream).reshape(x.shape)
    noisy_part = x.detach()[:, first_token:] if x.ndim > 1 else x.detach()
    if not noisy_part.numel():
        return x
    salt, either = round(probability / 2 * 2**32), round(probability * 2**32)
    low, high = extremes or _group_extremes(noisy_part, _running(group_size, len(x)))
    low, high = low.to(x), high.to(x)
    noisy = torch.where(words < salt, high, torch.where(words < either, low, x))
    return _spare(x, noisy, first_token)


def _group_extremes(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each sample's group, both (B, 1, ...)."""
    parts = []
    for group in x.split(group_size):
        low, high = torch.aminmax(group)
        parts.append(torch.stack((low, high)).expand(len(group), 2))
    low, high = torch.cat(parts).reshape(len(x), 2, *[1] * (x.ndim - 1)).unbind(1)
    return low, high


def circular_shift(
    x: Tensor, alpha: float, group_size: int | None = None, first_token: int = 0, detach: bool = False
) -> Tensor:
    """x_i <- (1 - alpha) x_i + alpha x_{i+1} within each group of consecutive samples; the last takes the first."""

    def term(group: Tensor) -> Tensor:
        return alpha * (torch.roll(group, -1, dims=0) - group)

    return _linear(x, term, group_size, first_token, detach)


def optimal_q(x: Tensor, group_size: int | None = None, first_token: int = 0, detach: bool = False) -> Tensor:
    """x_i <- (x_i + sum_j x_j) / (k + 1) within each group of k consecutive samples: I + Q = (I + 11^T) / (k + 1)."""

    def term(group: Tensor) -> Tensor:
        k = len(group)
        return (group.sum(0, keepdim=True) - k * group) / (k + 1)

    return _linear(x, term, group_size, first_token, detach)


def _linear(x: Tensor, term, group_size: int | None, first_token: int, detach: bool) -> Tensor:
    """x + Qx group by group. A last group that is smaller uses its own k; a group of one is returned to the bit.

    Computed in float32 at least: in float16 the sum over 50 samples of 1,400 would already be infinite.
    """
    mixed = []
    for group in x.split(_running(group_size, len(x))):
        if len(group) == 1:
            mixed.append(group)
            continue
        wide = group.to(torch.promote_types(x.dtype, torch.float32))
        q_x = term(wide)
        mixed.append((wide + (q_x.detach() if detach else q_x)).to(x.dtype))
    return _spare(x, torch.cat(mixed), first_token)


def _running(group_size: int | None, batch: int) -> int:
    return batch if group_size is None else group_size


def _spare(x: Tensor, noisy: Tensor, first_token: int) -> Tensor:
    return torch.cat((x[:, :first_token], noisy[:, first_token:]), dim=1) if first_token else noisy


def apply_noise(
    x: Tensor,
    config: NoiseConfig,
    sample_ids: Tensor,
    seed: int,
    epoch: Tensor,
    first_token: int = 0,
    extremes: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The configured noise on x (B, ...); `extremes` as salt_and_pepper takes them.

    Errors: ValueError where x and sample_ids disagree on the batch.
    """
    if len(x) != len(sample_ids):
        raise ValueError(
            f"noise at {config.site}: {len(x)} rows, {len(sample_ids)} sample ids; the axis is not the batch"
        )
    strength = config.strength or 0.0
    stream = stream_of(config.site, Purpose.MASK if config.kind == "salt_and_pepper" else Purpose.NOISE)
    if config.kind == "gaussian":
        return gaussian_noise(x, strength, sample_ids, seed, epoch, stream, first_token)
    if config.kind == "salt_and_pepper":
        group = config.group_size
        return salt_and_pepper(x, strength, sample_ids, seed, epoch, stream, group, first_token, extremes)
    if config.kind == "circular_shift":
        return circular_shift(x, strength, config.group_size, first_token, config.detach)
    assert config.kind == "optimal_q", config.kind
    return optimal_q(x, config.group_size, first_token, config.detach)


def image_noise(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    config: NoiseConfig,
    sample_ids: Tensor,
    seed: int,
    epoch: Tensor,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Pictures -> mirrored where `flip` -> normalised -> the configured noise, rounded once to `dtype`.

    images: uint8 (B, H, W, 3); mean, std: (3,), of levels from 0 to 1; flip: bool (B,). Returns (B, 3, H, W).
    Salt is white and pepper black.
    """
    x = images.permute(0, 3, 1, 2).to(torch.float32)
    if flip is not None:
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    mean, std = mean.view(3, 1, 1), std.view(3, 1, 1)
    x = (x / 255 - mean) / std
    if config.kind != "none":
        x = apply_noise(x, config, sample_ids, seed, epoch, extremes=(-mean / std, (1 - mean) / std))
    return x.to(dtype)


def norm_noise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    config: NoiseConfig,
    sample_ids: Tensor,
    seed: int,
    epoch: Tensor,
    first_token: int = 0,
) -> Tensor:
    """LayerNorm over the last axis and the configured noise behind it, in float32 at least, rounded once to x's dtype.

    x: (B, N, C); weight, bias: (C,). The official ViT's place of the noise: between `norm1` and `qkv`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normal = torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return apply_noise(normal, config, sample_ids, seed, epoch, first_token).to(x.dtype)
