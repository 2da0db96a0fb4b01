"""The noises as a user calls them: arguments checked, then the operators of operators.py.

Each takes what reference.py takes and gives what it gives: the same random integers, and floats to within the bounds
that tests/unit/test_noise_ops.py states. Strength and epoch may be tensors, so that a compiled model does not compile
again when they change.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.noise.config import LINEAR_KINDS, NoiseConfig
from pipeline.noise.operators import IMAGE_KINDS, NORM_KINDS
from pipeline.noise.reference import Purpose, stream_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_SAMPLE_ELEMENTS = 1 << 34  # blocks of four are counted in 32 bits
NORM_UNIT, NORM_WIDEST = 8, 1024  # elements that norm_noise takes at a time, and of a row that a GPU's warp can hold
_MASK32 = 0xFFFFFFFF


# ---- what a user calls ----


def gaussian_noise(
    x: Tensor, std: float | Tensor, sample_ids: Tensor, seed: int, epoch: Tensor, stream: int, first_token: int = 0
) -> Tensor:
    """x + N(0, std), in x's dtype (PAPER.md, section 2).

    x: (B, ...); std: at least 0; sample_ids: int64 (B,); epoch: int64 scalar; stream: of the site (stream_of). Tokens
    before `first_token` (axis 1) are left as they are, to the bit. Errors: ValueError naming what does not fit.
    """
    strength = _strength(std, "std", x, 0.0, math.inf)
    _check_batch(x, first_token)
    _check_ids(x, sample_ids)
    epoch = _check_draw(epoch, seed, stream, x)
    return torch.ops.noisynn.gaussian_noise(x, strength, sample_ids, epoch, seed, stream, first_token)


def salt_and_pepper(
    x: Tensor,
    probability: float | Tensor,
    sample_ids: Tensor,
    seed: int,
    epoch: Tensor,
    stream: int,
    group_size: int | None = None,
    first_token: int = 0,
    extremes: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Each entry becomes the highest value with probability p/2, the lowest with p/2 (PAPER.md, section 2).

    x: (B, ...). `extremes`: (lowest, highest), each with one entry for each channel of x (axis 1): black and white at
    the image. None: those of each group of samples, without gradient. Errors: ValueError naming what does not fit.
    """
    strength = _strength(probability, "probability", x, 0.0, 1.0)
    _check_batch(x, first_token)
    _check_ids(x, sample_ids)
    epoch, group = _check_draw(epoch, seed, stream, x), _check_group(group_size, x)
    noisy = x.detach()[:, first_token:] if x.ndim > 1 else x.detach()
    if noisy.numel() == 0:
        return x.clone()
    if extremes is None:
        low, high = _group_extremes(noisy, group)
    else:
        low, high = (_channel_extremes(extreme, x) for extreme in extremes)
    return torch.ops.noisynn.salt_and_pepper(x, low, high, strength, sample_ids, epoch, seed, stream, first_token)


def circular_shift(
    x: Tensor, alpha: float | Tensor, group_size: int | None = None, first_token: int = 0, detach: bool = False
) -> Tensor:
    """x_i <- (1 - alpha) x_i + alpha x_{i+1} within each group of consecutive samples; the last takes the first.

    x: (B, ...); alpha: from 0 to below 0.5. Errors: ValueError naming what does not fit.
    """
    strength = _strength(alpha, "alpha", x, 0.0, math.nextafter(0.5, 0))
    return _linear_mix(x, strength, False, group_size, first_token, detach)


def optimal_q(
    x: Tensor, group_size: int | None = None, first_token: int = 0, detach: bool = False, on: Tensor | None = None
) -> Tensor:
    """x_i <- (x_i + sum_j x_j) / (k + 1) within each group of k consecutive samples: I + Q = (I + 11^T) / (k + 1).

    x: (B, ...). `on`: float64 scalar, 0 where the noise is off. Errors: ValueError naming what does not fit.
    """
    strength = _strength(1.0 if on is None else on, "on", x, 0.0, 1.0)
    return _linear_mix(x, strength, True, group_size, first_token, detach)


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
    memory_format: torch.memory_format = torch.contiguous_format,
    strength: Tensor | None = None,
    stream: int | None = None,
) -> Tensor:
    """Pictures -> mirrored where `flip` -> normalised -> the configured noise, in one pass over memory.

    images: uint8 (B, H, W, 3); mean, std: float32 (3,), of levels from 0 to 1; flip: bool (B,); dtype: float32, float16
    or bfloat16. Returns (B, 3, H, W), contiguous or channels_last. strength, stream: as in apply_noise.
    Errors: ValueError naming what does not fit.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: give uint8 (samples, height, width, 3)")
    if images.shape[1] * images.shape[2] > _MASK32:
        raise ValueError(f"images of {images.shape[2]} x {images.shape[1]} pixels: fewer than 2^32 can be counted")
    if dtype not in DTYPES[:3]:
        raise ValueError(f"image_noise to {dtype}: take float32, bfloat16 or float16")
    for name, value in (("mean", mean), ("std", std)):
        if value.numel() != 3 or value.dtype != torch.float32:
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}: give float32, one for each channel")
    if flip is not None and (flip.shape != images.shape[:1] or flip.dtype != torch.bool):
        raise ValueError(f"flip is {flip.dtype} {tuple(flip.shape)}: give bool, one for each of {len(images)} samples")
    _check_ids(images, sample_ids)
    level: Any = (1.0 if config.strength is None else config.strength) if strength is None else strength
    stream = noise_stream(config) if stream is None else stream
    count, height, width, _ = images.shape
    out = torch.empty((count, 3, height, width), dtype=dtype, device=images.device, memory_format=memory_format)
    torch.ops.noisynn.image_noise_(
        images,
        mean.to(images.device).contiguous(),
        std.to(images.device).contiguous(),
        torch.empty(0, dtype=torch.bool, device=images.device) if flip is None else flip.to(images.device).contiguous(),
        IMAGE_KINDS.index(config.kind),
        _strength(level, "strength", images, 0.0, math.inf),
        sample_ids,
        _check_draw(epoch, seed, stream, images),
        seed,
        stream,
        _check_group(config.group_size, images),
        memory_format == torch.channels_last,
        out,
    )
    return out


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
    strength: Tensor | None = None,
    stream: int | None = None,
) -> Tensor:
    """LayerNorm over the last axis and the configured noise behind it, in one pass, rounded once to x's dtype.

    x: (B, N, C); weight, bias: (C,). In two passes, and rounded after the first, where a pass cannot do it: for
    salt-and-pepper (whose extremes are those of the whole group), for a C that is no multiple of 8 or is above 1,024,
    and for a sample that is a linear noise's group by itself.
    strength, stream, first_token: as in apply_noise. Errors: ValueError naming what does not fit.
    """
    _check_batch(x, first_token)
    _check_ids(x, sample_ids)
    width = x.shape[-1]
    if weight.shape != (width,) or bias.shape != (width,):
        raise ValueError(
            f"LayerNorm of {tuple(weight.shape)} weights and {tuple(bias.shape)} biases on rows of {width}"
        )
    group = _check_group(config.group_size, x)
    linear = config.kind in LINEAR_KINDS
    if linear and group > 1 and len(x) % group == 1:
        # The last is a group by itself, and must get what torch's LayerNorm gives, to the bit.
        parts = (x[:-1], sample_ids[:-1]), (x[-1:], sample_ids[-1:])
        rest = (seed, epoch, first_token, strength, stream)
        return torch.cat([norm_noise(part, weight, bias, eps, config, ids, *rest) for part, ids in parts])
    alone = linear and group == 1
    if config.kind not in NORM_KINDS or alone or x.ndim != 3 or width % NORM_UNIT or width > NORM_WIDEST:
        normal = torch.nn.functional.layer_norm(x, (width,), weight.to(x.dtype), bias.to(x.dtype), eps).to(x.dtype)
        return apply_noise(normal, config, sample_ids, seed, epoch, first_token, None, strength, stream)
    wide = torch.promote_types(x.dtype, torch.float32)
    stream = noise_stream(config) if stream is None else stream
    level: Any = (1.0 if config.strength is None else config.strength) if strength is None else strength
    return torch.ops.noisynn.norm_noise(
        x,
        weight.to(wide),
        bias.to(wide),
        eps,
        NORM_KINDS.index(config.kind),
        _strength(level, "strength", x, 0.0, math.inf),
        sample_ids,
        _check_draw(epoch, seed, stream, x),
        seed,
        stream,
        group,
        min(first_token, x.shape[1]),
        config.detach,
    )[0]


def random_words(count: int, sample_ids: Tensor, seed: int, epoch: Tensor, stream: int) -> Tensor:
    """The first `count` words of each sample: reference.random_words.

    sample_ids: int64 (B,); epoch: int64 scalar. Returns int64 (B, count), each entry in [0, 2^32).
    """
    epoch = _check_draw(epoch, seed, stream, sample_ids)
    return torch.ops.noisynn.random_words(sample_ids, epoch, count, seed, stream)


def apply_noise(
    x: Tensor,
    config: NoiseConfig,
    sample_ids: Tensor,
    seed: int,
    epoch: Tensor,
    first_token: int = 0,
    extremes: tuple[Tensor, Tensor] | None = None,
    strength: Tensor | None = None,
    stream: int | None = None,
) -> Tensor:
    """The configured noise on x (B, ...). Errors: ValueError naming what does not fit, and for a noise of kind none.

    strength: float64 scalar in place of the configured one (of optimal Q: 0 is off). stream: noise_stream(config),
    where that cannot be computed on the way (in a compiled model).
    """
    stream = noise_stream(config) if stream is None else stream
    level: Any = config.strength if strength is None else strength
    group, detach = config.group_size, config.detach
    if len(x) != len(sample_ids):
        raise ValueError(
            f"noise at {config.site}: {len(x)} rows, {len(sample_ids)} sample ids; the axis is not the batch"
        )
    if config.kind == "gaussian":
        return gaussian_noise(x, level, sample_ids, seed, epoch, stream, first_token)
    if config.kind == "salt_and_pepper":
        return salt_and_pepper(x, level, sample_ids, seed, epoch, stream, group, first_token, extremes)
    if config.kind == "circular_shift":
        return circular_shift(x, level, group, first_token, detach)
    if config.kind != "optimal_q":
        raise ValueError(f"noise.kind is {config.kind!r}: there is nothing to apply; leave the call out")
    return optimal_q(x, group, first_token, detach, strength)


def noise_stream(config: NoiseConfig) -> int:
    """The stream that the configured noise draws from."""
    return stream_of(config.site, Purpose.MASK if config.kind == "salt_and_pepper" else Purpose.NOISE)


# ---- checks ----


def _strength(value: float | Tensor, name: str, x: Tensor, low: float, high: float) -> Tensor:
    """float64 scalar on x's device. A tensor's value is not looked at: that would wait for the device."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.requires_grad:
            raise ValueError(
                f"{name} has {value.numel()} numbers or asks for a gradient: give one, which is not learned"
            )
        return value.reshape(()).to(x.device, torch.float64)
    if not low <= value <= high or math.isinf(value):
        raise ValueError(f"{name} is {value}: it must be a finite number from {low:g} to {high:g}")
    return torch.full((), value, dtype=torch.float64, device=x.device)  # no copy that a GPU would be waited for


def _check_group(group_size: int | None, x: Tensor) -> int:
    """Of the running batch, where it is None or larger."""
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size is {group_size}: give at least 1, or None for the whole batch")
    batch = max(1, len(x))
    return batch if group_size is None else min(group_size, batch)


def _check_draw(epoch: Tensor, seed: int, stream: int, x: Tensor) -> Tensor:
    """The epoch on x's device."""
    if not isinstance(epoch, Tensor) or epoch.dtype != torch.int64 or epoch.numel() != 1:
        raise ValueError(f"epoch is {epoch!r}: give a tensor of one int64, such as torch.tensor(3)")
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value <= _MASK32:
            raise ValueError(f"{name} is {value}: it must be from 0 to 2^32 - 1")
    return epoch.reshape(()).to(x.device)


def _check_batch(x: Tensor, first_token: int) -> None:
    if x.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"noise on {str(x.dtype).removeprefix('torch.')}: convert it to one of {known}")
    if x.is_cuda and x.dtype == torch.float64:
        raise ValueError("noise on float64 is for the CPU: convert it to float32, or move it there")
    if x.ndim < 1 or (first_token and x.ndim < 2):
        raise ValueError(f"noise on a tensor of shape {tuple(x.shape)}: the first axis is the batch, the second tokens")
    if first_token < 0:
        raise ValueError(f"first_token is {first_token}: it must be 0 or more")
    if len(x) and x.numel() // len(x) > MAX_SAMPLE_ELEMENTS:
        raise ValueError(f"a sample of {tuple(x.shape[1:])} is over 2^34 elements: noise is counted in 32-bit blocks")


def _check_ids(x: Tensor, sample_ids: Tensor) -> None:
    if sample_ids.shape != x.shape[:1]:
        raise ValueError(f"{len(x)} rows, {sample_ids.numel()} sample ids; is the first axis the batch?")
    if sample_ids.dtype != torch.int64 or sample_ids.device != x.device:
        raise ValueError(
            f"sample_ids are {sample_ids.dtype} on {sample_ids.device}: give int64 on {x.device}, where x is"
        )


# ---- extremes ----


def _group_extremes(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each sample's group: float64 (B, 1) each."""
    whole = len(x) // group_size * group_size
    pairs = []
    for part, size in ((x[:whole], group_size), (x[whole:], len(x) - whole)):
        if len(part):
            groups = part.unflatten(0, (-1, size))
            axes = tuple(range(1, groups.ndim))
            pair = torch.stack((groups.amin(axes), groups.amax(axes)), dim=1)
            pairs.append(pair.repeat_interleave(size, 0))
    low, high = torch.cat(pairs).to(torch.float64).split(1, dim=1)
    return low.contiguous(), high.contiguous()


def _channel_extremes(extreme: Tensor, x: Tensor) -> Tensor:
    """float64 (B, C) of C entries."""
    if x.ndim < 2 or extreme.numel() != x.shape[1]:
        raise ValueError(f"extremes have {extreme.numel()} entries for {tuple(x.shape)}: give one for each of axis 1")
    # Rounded to x's format first: a pixel that is white then equals the salt.
    return extreme.to(x).to(torch.float64).reshape(1, -1).expand(len(x), -1).contiguous()


def _linear_mix(
    x: Tensor, strength: Tensor, optimal: bool, group_size: int | None, first_token: int, detach: bool
) -> Tensor:
    _check_batch(x, first_token)
    group = _check_group(group_size, x)
    return torch.ops.noisynn.linear_mix(x, strength, optimal, group, first_token, False, detach)
