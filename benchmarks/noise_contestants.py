"""What is timed of each noise: the torch expression a user would write (eager, and compiled), the operator, a copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Contestant
from pipeline.noise import native, ops, reference
from pipeline.noise.config import Kind, NoiseConfig

TOKENS, WIDTH = 197, 768  # ViT-B/16 at 224 pixels
GROUP = 8
IMAGE_SIDE, IMAGE_MEAN, IMAGE_STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STD, PROBABILITY, ALPHA = 0.5, 0.05, 0.3
STRENGTHS: dict[Kind, float | None] = {
    "gaussian": STD,
    "salt_and_pepper": PROBABILITY,
    "circular_shift": ALPHA,
    "optimal_q": None,
}
DRAWN: tuple[Kind, ...] = ("gaussian", "salt_and_pepper")
NORM_EPSILON = 1e-6  # of timm's ViT
GPU_CALLS = 10  # of a round: one launch and one wait for the queue take some 20 us


class Made(NamedTuple):
    """What a contestant makes of `x`; draws of different generators agree only in distribution."""

    noisy: Tensor
    x: Tensor
    random: bool


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By torch.compile for the shapes at hand, as for any model of one shape."""
    return torch.compile(function, dynamic=False)


def kernels_text(device_type: str) -> str:
    return "kernels" if native.is_loaded(device_type) else "NO KERNELS: the reference"


def timed_round(run: Callable[[], Tensor], elements: int, device_type: str, calls: int) -> int:
    """Runs, waits for a GPU's queue, and returns how many elements were made."""
    with torch.no_grad():  # a way back asks for gradients itself
        for _ in range(calls):
            run()
    if device_type == "cuda":
        torch.cuda.synchronize()
    return calls * elements


Work = dict[str, tuple[Callable[[], Tensor], str]]  # a contestant's name -> (what it runs, its settings)
# Which make no noise, so that there is nothing to compare.
_BOUNDS = ("clone", "copy", "LayerNorm alone", "LayerNorm compiled")


class Site(NamedTuple):
    """A noise and its draw as a model's injector gives it: numbers are on the device already."""

    config: NoiseConfig
    ids: Tensor
    epoch: Tensor
    strength: Tensor
    stream: int

    @classmethod
    def of(cls, kind: Kind, samples: int, device: torch.device) -> Site:
        config = NoiseConfig(kind=kind, strength=STRENGTHS[kind], site="blocks.11.attn", group_size=GROUP)
        return cls(
            config,
            torch.arange(samples, device=device),
            torch.tensor(0, device=device),
            torch.tensor(config.strength_at(0), dtype=torch.float64, device=device),
            ops.noise_stream(config),
        )


def contestants_of(kind: Kind, x: Tensor) -> list[Contestant]:
    """On x, in its own layout. Eager first: ratios are to what a user would write."""
    config, ids, epoch, strength, stream = Site.of(kind, len(x), x.device)
    eager, expression = EAGER[kind]
    target = torch.empty_like(x)
    work: Work = {
        "eager": (partial(eager, x), expression),
        "reference": (
            partial(reference.apply_noise, x, config, ids, 0, epoch),
            "pipeline/noise/reference.py: the specification, not fast code",
        ),
        "torch.compile": (partial(compiled(eager), x), f"torch.compile of {expression}"),
        "operator": (
            partial(ops.apply_noise, x, config, ids, 0, epoch, strength=strength, stream=stream),
            f"pipeline/noise/ops.py, {kernels_text(x.device.type)}",
        ),
        "clone": (x.clone, "x.clone(): into new memory, as all others"),
        "copy": (partial(target.copy_, x), "target.copy_(x) into memory that is there already: the bound by bandwidth"),
    }
    return _listed(work, x, kind in DRAWN, 2 * x.element_size())


def image_contestants(count: int, dtype: torch.dtype, device: torch.device) -> list[Contestant]:
    """uint8 pictures of 224 pixels to the network's input: half mirrored, normalised, Gaussian noise."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (count, IMAGE_SIDE, IMAGE_SIDE, 3)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(value, device=device) for value in (IMAGE_MEAN, IMAGE_STD))
    flip = torch.arange(count, device=device) % 2 == 0
    config, ids, epoch, strength, stream = Site.of("gaussian", count, device)

    def chain(pictures: Tensor) -> Tensor:
        x = pictures.permute(0, 3, 1, 2).float()
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
        x = (x / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        return (x + torch.randn_like(x) * STD).to(dtype).contiguous()

    run = partial(ops.image_noise, images, mean, std, config, ids, 0, epoch, flip, dtype)
    plain = reference.image_noise(images, mean, std, NoiseConfig(), ids, 0, epoch, flip)
    bytes_per_value = images.element_size() + dtype.itemsize  # one is read, the other written; a copy does half each
    half = images.numel() * bytes_per_value // 2
    source = torch.randint(0, 256, (half,), generator=generator, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    expression = "permute, float, flip, / 255, - mean, / std, + torch.randn_like(x) * s"
    work: Work = {
        "eager": (partial(chain, images), expression),
        "torch.compile": (partial(compiled(chain), images), f"torch.compile of {expression}"),
        "operator": (
            partial(run, strength=strength, stream=stream),
            f"pipeline/noise/ops.py, {kernels_text(device.type)}",
        ),
        "copy": (
            partial(target.copy_, source),
            "target.copy_(source) of uint8, as many bytes read and written in all: the bound by bandwidth",
        ),
    }
    return _listed(work, plain, True, bytes_per_value)


def norm_contestants(kind: Kind, x: Tensor, backward: bool) -> list[Contestant]:
    """LayerNorm and the noise behind it on x (B, N, C); with the way back, the gradients of x, weight and bias too."""
    config, ids, epoch, strength, stream = Site.of(kind, len(x), x.device)
    generator = torch.Generator(x.device).manual_seed(1)
    width = x.shape[-1]
    offsets = (0.1 * torch.randn(2, width, generator=generator, device=x.device)).to(x)
    weight, bias = 1 + offsets[0], offsets[1]
    noise, expression = EAGER[kind]

    def alone(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(t, (width,), weight, bias, NORM_EPSILON)

    def eager(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return noise(alone(t, weight, bias))

    def operator(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.norm_noise(t, weight, bias, NORM_EPSILON, config, ids, 0, epoch, strength=strength, stream=stream)

    chain = f"x = F.layer_norm(x, ...), then {expression}"
    functions = {
        "eager": (eager, chain),
        "torch.compile": (compiled(eager), f"torch.compile of {chain}"),
        "operator": (operator, f"norm_noise of pipeline/noise/ops.py, {kernels_text(x.device.type)}"),
        "LayerNorm alone": (alone, "F.layer_norm(x, ...), eager: no noise"),
        "LayerNorm compiled": (compiled(alone), "torch.compile of F.layer_norm(x, ...): no noise"),
    }
    leaves = [tensor.clone().requires_grad_(backward) for tensor in (x, weight, bias)]
    upstream = torch.randn(x.shape, generator=generator, device=x.device).to(x)

    def there_and_back(function: Callable[..., Tensor]) -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves), leaves, upstream)[0]

    way = there_and_back if backward else lambda function: function(*leaves)
    work: Work = {name: (partial(way, function), settings) for name, (function, settings) in functions.items()}
    if not backward:
        target = torch.empty_like(x)
        work["copy"] = (partial(target.copy_, x), "target.copy_(x) into memory that is there already")
    # The way back is the same for any draw. Forward: x is read, y written; back: a gradient and x read, one written.
    normal = alone(x, weight, bias)
    return _listed(work, normal, kind in DRAWN and not backward, (5 if backward else 2) * x.element_size())


def _calls(name: str, device: torch.device) -> int:
    return GPU_CALLS if device.type == "cuda" and name != "reference" else 1


def _listed(work: Work, x: Tensor, random: bool, bytes_per_item: int) -> list[Contestant]:
    """x: what the noise is added to, of as many elements as are made."""
    return [
        Contestant(
            name=name,
            round=partial(timed_round, run, x.numel(), x.device.type, _calls(name, x.device)),
            settings=settings,
            output=None if name in _BOUNDS else partial(_made, run, x, random),
            bytes_per_item=bytes_per_item,
        )
        for name, (run, settings) in work.items()
    ]


@torch.no_grad()
def _made(run: Callable[[], Tensor], x: Tensor, random: bool) -> Made:
    return Made(run(), x, random)


def agree(one: Made, other: Made) -> str | None:
    """Linear noises agree entry by entry; drawn ones in mean and spread of what they add, to 3 % of that spread."""
    a, b = one.noisy, other.noisy
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{tuple(a.shape)} of {a.dtype} and {tuple(b.shape)} of {b.dtype}"
    if not one.random:
        # The two round in another order: 0.3 eps root mean square and 2.5 at most were seen, on standard normals.
        difference, eps = a.float() - b.float(), torch.finfo(a.dtype).eps
        typical, worst = difference.square().mean().sqrt().item(), difference.abs().max().item()
        return None if typical <= eps and worst <= 16 * eps else f"{typical:.3g} apart, at most {worst:.3g}"
    added_a, added_b = a.float() - one.x.float(), b.float() - other.x.float()
    (std_a, mean_a), (std_b, mean_b) = torch.std_mean(added_a), torch.std_mean(added_b)
    if max(abs(std_a - std_b), abs(mean_a - mean_b)) > 0.03 * max(std_a, std_b):
        return f"one adds {mean_a:.4f} +- {std_a:.4f}, the other {mean_b:.4f} +- {std_b:.4f}"
    return None


def _gaussian(x: Tensor) -> Tensor:
    return x + torch.randn_like(x) * STD


def _salt_and_pepper(x: Tensor) -> Tensor:
    low, high = x.view(-1, GROUP * TOKENS * WIDTH).aminmax(dim=1)
    low, high = (extreme.repeat_interleave(GROUP)[:, None, None] for extreme in (low, high))
    # float32 in any case: bfloat16's uniforms are multiples of 1/256, and 0.025 would become 7/256.
    draw = torch.rand(x.shape, device=x.device)
    return torch.where(draw < PROBABILITY / 2, high, torch.where(draw < PROBABILITY, low, x))


def _circular_shift(x: Tensor) -> Tensor:
    g = x.unflatten(0, (-1, GROUP))
    return ((1 - ALPHA) * g + ALPHA * g.roll(-1, 1)).flatten(0, 1)


def _optimal_q(x: Tensor) -> Tensor:
    g = x.unflatten(0, (-1, GROUP))
    return ((g + g.sum(1, keepdim=True)) / (GROUP + 1)).flatten(0, 1)


EAGER: dict[Kind, tuple[Callable[[Tensor], Tensor], str]] = {
    "gaussian": (_gaussian, "x + torch.randn_like(x) * s"),
    "salt_and_pepper": (_salt_and_pepper, "torch.where on torch.rand(x.shape), extremes of each group by aminmax"),
    "circular_shift": (_circular_shift, "(1 - a) * g + a * g.roll(-1, 1) on groups g"),
    "optimal_q": (_optimal_q, "(g + g.sum(1, keepdim=True)) / (k + 1) on groups g"),
}
