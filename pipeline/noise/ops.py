"""The noises as operators of torch: schema, shapes for the compiler, gradients; kernels where they are built.

Each takes what reference.py takes and gives what it gives: the same random integers, and floats to within the bounds
that tests/unit/test_noise_ops.py states. Strength and epoch may be tensors, so that a compiled model does not compile
again when they change. Nothing is kept for the backward pass but the sample ids: what is needed is drawn again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.noise import native, reference
from pipeline.noise.config import NoiseConfig
from pipeline.noise.reference import Purpose, stream_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_SAMPLE_ELEMENTS = 1 << 34  # blocks of four are counted in 32 bits
_MASK32 = 0xFFFFFFFF
_DRAW = "Tensor sample_ids, Tensor epoch, int seed, int stream"

torch.library.define("noisynn::gaussian_noise", f"(Tensor x, Tensor strength, {_DRAW}, int first_token) -> Tensor")
torch.library.define(
    "noisynn::salt_and_pepper",
    f"(Tensor x, Tensor low, Tensor high, Tensor strength, {_DRAW}, int first_token) -> Tensor",
)
torch.library.define(
    "noisynn::linear_mix",
    "(Tensor x, Tensor strength, bool optimal, int group_size, int first_token, bool transposed, bool detach)"
    " -> Tensor",
)
torch.library.define(
    "noisynn::random_words", "(Tensor sample_ids, Tensor epoch, int count, int seed, int stream) -> Tensor"
)
torch.library.define(
    "noisynn::image_noise_",
    f"(Tensor images, Tensor mean, Tensor std, Tensor flip, int kind, Tensor strength, {_DRAW}, int group_size, "
    "bool channels_last, Tensor(a!) out) -> ()",
)
_IMAGE_KINDS = ("none", "gaussian", "salt_and_pepper", "circular_shift", "optimal_q")  # csrc/image_cpu.cpp's order


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
    epoch = epoch.to(x.device)
    return torch.ops.noisynn.gaussian_noise(x, strength, sample_ids, epoch, seed & _MASK32, stream, first_token)


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
    if x[:, first_token:].numel() == 0:
        return x.clone()
    if extremes is None:
        low, high = _group_extremes(x.detach()[:, first_token:], group_size or len(x))
    else:
        low, high = (_channel_extremes(extreme, x) for extreme in extremes)
    epoch, seed = epoch.to(x.device), seed & _MASK32
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
    if dtype not in DTYPES[:3]:
        raise ValueError(f"image_noise to {dtype}: take float32, bfloat16 or float16")
    for name, value in (("mean", mean), ("std", std)):
        if value.numel() != 3 or value.dtype != torch.float32:
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}: give float32, one for each channel")
    if flip is not None and (flip.shape != images.shape[:1] or flip.dtype != torch.bool):
        raise ValueError(f"flip is {flip.dtype} {tuple(flip.shape)}: give bool, one for each of {len(images)} samples")
    _check_ids(images, sample_ids)
    level: Any = (1.0 if config.strength is None else config.strength) if strength is None else strength
    count, height, width, _ = images.shape
    out = torch.empty((count, 3, height, width), dtype=dtype, device=images.device, memory_format=memory_format)
    torch.ops.noisynn.image_noise_(
        images,
        mean.contiguous(),
        std.contiguous(),
        torch.empty(0, dtype=torch.bool, device=images.device) if flip is None else flip.contiguous(),
        _IMAGE_KINDS.index(config.kind),
        _strength(level, "strength", images, 0.0, math.inf),
        sample_ids,
        epoch.to(images.device),
        seed & _MASK32,
        noise_stream(config) if stream is None else stream,
        max(1, count) if config.group_size is None else config.group_size,
        memory_format == torch.channels_last,
        out,
    )
    return out


def random_words(count: int, sample_ids: Tensor, seed: int, epoch: Tensor, stream: int) -> Tensor:
    """The first `count` words of each sample: reference.random_words.

    sample_ids: int64 (B,); epoch: int64 scalar. Returns int64 (B, count), each entry in [0, 2^32).
    """
    epoch = epoch.to(sample_ids.device)
    return torch.ops.noisynn.random_words(sample_ids, epoch, count, seed & _MASK32, stream)


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
    """The configured noise on x (B, ...). Errors: ValueError where x and sample_ids disagree on the batch.

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
    assert config.kind == "optimal_q", config.kind
    return optimal_q(x, group, first_token, detach, strength)


def noise_stream(config: NoiseConfig) -> int:
    """The stream that the configured noise draws from."""
    return stream_of(config.site, Purpose.MASK if config.kind == "salt_and_pepper" else Purpose.NOISE)


# ---- checks ----


def _strength(value: float | Tensor, name: str, x: Tensor, low: float, high: float) -> Tensor:
    """float64 scalar on x's device. A tensor's value is not looked at: that would wait for the device."""
    if isinstance(value, Tensor):
        return value.to(x.device, torch.float64)
    if not low <= value <= high or math.isinf(value):
        raise ValueError(f"{name} is {value}: it must be a finite number from {low:g} to {high:g}")
    return torch.tensor(value, dtype=torch.float64, device=x.device)


def _check_batch(x: Tensor, first_token: int) -> None:
    if x.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"noise on {str(x.dtype).removeprefix('torch.')}: convert it to one of {known}")
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
    sizes = [min(group_size, len(x) - start) for start in range(0, len(x), group_size)]
    pairs = [torch.stack(torch.aminmax(group)).expand(len(group), 2) for group in x.split(sizes)]
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
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size is {group_size}: give at least 1, or None for the whole batch")
    group = max(1, len(x)) if group_size is None else group_size
    return torch.ops.noisynn.linear_mix(x, strength, optimal, group, first_token, False, detach)


# ---- gradients, shapes, and what stands in for kernels that are not built ----


def _register(name: str, plain: Any, fake: Any) -> None:
    operator = f"noisynn::{name}"
    torch.library.register_fake(operator, fake)
    for device_type in ("cpu", "cuda"):
        if not native.is_loaded(device_type):
            torch.library.impl(operator, device_type, plain)


def _plain_gaussian(x, strength, sample_ids, epoch, seed, stream, first_token):
    if strength == 0:
        return x.clone()
    y = reference.gaussian_noise(x, strength.item(), sample_ids, seed, epoch, stream, first_token)
    return torch.empty_like(x).copy_(y)


def _plain_salt_and_pepper(x, low, high, strength, sample_ids, epoch, seed, stream, first_token):
    shape = (len(x), low.shape[1], *[1] * (x.ndim - 2)) if x.ndim > 1 else (len(x),)
    extremes = low.reshape(shape), high.reshape(shape)
    y = reference.salt_and_pepper(
        x, strength.item(), sample_ids, seed, epoch, stream, first_token=first_token, extremes=extremes
    )
    return torch.empty_like(x).copy_(y)


def _plain_linear_mix(x, strength, optimal, group_size, first_token, transposed, detach):
    if strength == 0 or len(x) == 0:
        return x.clone()
    if optimal:
        y = reference.optimal_q(x, group_size, first_token)
    elif transposed:  # the ring the other way round, group by group
        turned = torch.cat([group.flip(0) for group in x.split(group_size)])
        mixed = reference.circular_shift(turned, strength.item(), group_size, first_token)
        y = torch.cat([group.flip(0) for group in mixed.split(group_size)])
    else:
        y = reference.circular_shift(x, strength.item(), group_size, first_token)
    return torch.empty_like(x).copy_(y)


def _plain_random_words(sample_ids, epoch, count, seed, stream):
    return reference.random_words(count, sample_ids, seed, epoch, stream).contiguous()


def _plain_image_noise(images, mean, std, flip, kind, strength, sample_ids, epoch, seed, stream, group, last, out):
    x = reference.image_noise(images, mean, std, NoiseConfig(), sample_ids, seed, epoch, flip if len(flip) else None)
    options: dict[str, Any] = {"kind": _IMAGE_KINDS[kind], "group_size": group}
    if _IMAGE_KINDS[kind] not in ("none", "optimal_q"):
        options["strength"] = strength.item()
    if strength != 0 and kind:
        extremes = tuple((level - mean).div(std).view(3, 1, 1) for level in (0, 1))
        x = reference.apply_noise(x, NoiseConfig(**options), sample_ids, seed, epoch, 0, extremes)
    out.copy_(x)


def _like_x(x, *args):
    return torch.empty_like(x)


_register("gaussian_noise", _plain_gaussian, _like_x)
_register("salt_and_pepper", _plain_salt_and_pepper, _like_x)
_register("linear_mix", _plain_linear_mix, _like_x)
_register("image_noise_", _plain_image_noise, lambda *args: None)
_register(
    "random_words",
    _plain_random_words,
    lambda sample_ids, epoch, count, seed, stream: sample_ids.new_empty((sample_ids.shape[0], count)),
)


def _gaussian_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (gradient, *[None] * 6)


def _keep_draw(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, high, strength, sample_ids, epoch, *ctx.draw = inputs
    ctx.parts = high.shape[1]
    ctx.save_for_backward(strength, sample_ids, epoch)


def _salt_and_pepper_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """What was replaced gets none: the same decision again, with 0 for both extremes."""
    strength, sample_ids, epoch = ctx.saved_tensors
    nothing = torch.zeros((gradient.shape[0], ctx.parts), dtype=torch.float64, device=gradient.device)
    kept = torch.ops.noisynn.salt_and_pepper(gradient, nothing, nothing, strength, sample_ids, epoch, *ctx.draw)
    return (kept, *[None] * 8)


def _keep_mix(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, strength, *ctx.mix = inputs
    ctx.save_for_backward(strength)


def _linear_mix_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (strength,) = ctx.saved_tensors
    optimal, group_size, first_token, transposed, detach = ctx.mix
    if not detach:
        gradient = torch.ops.noisynn.linear_mix(
            gradient, strength, optimal, group_size, first_token, not transposed, False
        )
    return (gradient, *[None] * 6)


torch.library.register_autograd("noisynn::gaussian_noise", _gaussian_backward)
torch.library.register_autograd("noisynn::salt_and_pepper", _salt_and_pepper_backward, setup_context=_keep_draw)
torch.library.register_autograd("noisynn::linear_mix", _linear_mix_backward, setup_context=_keep_mix)
