"""The noises as operators of torch: schemas, shapes for the compiler, gradients; kernels where they are built.

Nothing is kept for the backward pass but the sample ids (and of LayerNorm what it always keeps): what is needed is
drawn again. ops.py checks arguments and calls these; where no kernels are built, reference.py stands in for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.noise import native, reference
from pipeline.noise.config import NoiseConfig

# In the order in which csrc/ numbers them.
IMAGE_KINDS = ("none", "gaussian", "salt_and_pepper", "circular_shift", "optimal_q")
NORM_KINDS = ("gaussian", "circular_shift", "optimal_q")
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
torch.library.define(
    "noisynn::norm_noise",
    f"(Tensor x, Tensor weight, Tensor bias, float eps, int kind, Tensor strength, {_DRAW}, int group_size, "
    "int first_token, bool detach) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "noisynn::norm_noise_backward",
    "(Tensor gradient, Tensor x, Tensor weight, Tensor mean, Tensor scale, int kind, Tensor strength, int group_size, "
    "int first_token) -> (Tensor, Tensor, Tensor)",
)
_BACKWARD_PARTS = {"cpu": 64, "cuda": 1024}  # rows of weights' gradients that csrc/norm_*.c* leave to be added up


def _register(name: str, plain: Any, fake: Any, devices: tuple[str, ...] = ("cpu", "cuda")) -> None:
    """devices: those that csrc/ has kernels for."""
    operator = f"noisynn::{name}"
    torch.library.register_fake(operator, fake)
    for device_type in ("cpu", "cuda"):
        if device_type not in devices or not native.is_loaded(device_type):
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
    options: dict[str, Any] = {"kind": IMAGE_KINDS[kind], "group_size": group}
    if IMAGE_KINDS[kind] not in ("none", "optimal_q"):
        options["strength"] = strength.item()
    if strength != 0 and kind:
        extremes = tuple((level - mean).div(std).view(3, 1, 1) for level in (0, 1))
        x = reference.apply_noise(x, NoiseConfig(**options), sample_ids, seed, epoch, 0, extremes)
    out.copy_(x)


def _plain_norm_noise(
    x, weight, bias, eps, kind, strength, sample_ids, epoch, seed, stream, group_size, first_token, detach
):
    rows = x.to(weight.dtype)
    variance, mean = torch.var_mean(rows, dim=-1, correction=0)
    scale = torch.rsqrt(variance + eps)
    y = torch.nn.functional.layer_norm(rows, x.shape[-1:], weight, bias, eps)
    if NORM_KINDS[kind] == "gaussian":
        y = _plain_gaussian(y, strength, sample_ids, epoch, seed, stream, first_token)
    else:
        y = _plain_linear_mix(y, strength, NORM_KINDS[kind] == "optimal_q", group_size, first_token, False, detach)
    return y.to(x.dtype).contiguous(), mean, scale


def _plain_norm_noise_backward(gradient, x, weight, mean, scale, kind, strength, group_size, first_token):
    g = gradient.to(weight.dtype)
    if NORM_KINDS[kind] != "gaussian":
        g = _plain_linear_mix(g, strength, NORM_KINDS[kind] == "optimal_q", group_size, first_token, True, False)
    n = (x.to(weight.dtype) - mean[..., None]) * scale[..., None]
    parts = (
        weight.new_zeros((_BACKWARD_PARTS.get(x.device.type, 1), len(weight))),
        weight.new_zeros((_BACKWARD_PARTS.get(x.device.type, 1), len(weight))),
    )
    parts[0][0], parts[1][0] = (g * n).sum((0, 1)), g.sum((0, 1))
    g = g * weight
    dx = scale[..., None] * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    return dx.to(x.dtype).contiguous(), *parts


def _like_x(x, *args):
    return torch.empty_like(x)


_register("gaussian_noise", _plain_gaussian, _like_x)
_register("salt_and_pepper", _plain_salt_and_pepper, _like_x)
_register("linear_mix", _plain_linear_mix, _like_x)
_register(
    "norm_noise",
    _plain_norm_noise,
    lambda x, weight, *args: (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        weight.new_empty(x.shape[:2]),
        weight.new_empty(x.shape[:2]),
    ),
)
_register(
    "norm_noise_backward",
    _plain_norm_noise_backward,
    lambda gradient, x, weight, *args: (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        weight.new_empty((_BACKWARD_PARTS.get(x.device.type, 1), weight.shape[0])),
        weight.new_empty((_BACKWARD_PARTS.get(x.device.type, 1), weight.shape[0])),
    ),
)
_register("image_noise_", _plain_image_noise, lambda *args: None)
_register(
    "random_words",
    _plain_random_words,
    lambda sample_ids, epoch, count, seed, stream: sample_ids.new_empty((sample_ids.shape[0], count)),
    devices=("cpu",),  # on a GPU for tests and statistics alone
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


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _, kind, strength, *_, group_size, first_token, detach = inputs
    _, mean, scale = output
    # Without its gradient a linear noise is passed by on the way back, as one that was added.
    ctx.mix = (0 if detach else kind), group_size, first_token
    ctx.mark_non_differentiable(mean, scale)
    ctx.save_for_backward(x, weight, mean, scale, strength)


def _norm_noise_backward(ctx: Any, gradient: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, mean, scale, strength = ctx.saved_tensors
    kind, group_size, first_token = ctx.mix
    dx, dweight, dbias = torch.ops.noisynn.norm_noise_backward(
        gradient, x, weight, mean, scale, kind, strength, group_size, first_token
    )
    return (dx, dweight.sum(0), dbias.sum(0), *[None] * 10)


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "norm_noise has no second derivative: use torch's LayerNorm and the noise behind it (ops.apply_noise)"
    )


torch.library.register_autograd("noisynn::norm_noise_backward", _no_second_derivative)
torch.library.register_autograd("noisynn::norm_noise", _norm_noise_backward, setup_context=_keep_norm)
torch.library.register_autograd("noisynn::gaussian_noise", _gaussian_backward)
torch.library.register_autograd("noisynn::salt_and_pepper", _salt_and_pepper_backward, setup_context=_keep_draw)
torch.library.register_autograd("noisynn::linear_mix", _linear_mix_backward, setup_context=_keep_mix)
