"""Elements a second of each noise, beside the torch expression a user would write (eager, and compiled) and a copy."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
from torch import Tensor

from benchmarks.harness import Contestant, Row, check_output, circumstances_of, compare, finish, status_line, summarise
from pipeline.noise import native, ops, reference
from pipeline.noise.config import Kind, NoiseConfig

TOKENS, WIDTH = 197, 768  # ViT-B/16 at 224 pixels
GROUP = 8
IMAGE_SIDE, IMAGE_MEAN, IMAGE_STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Bytes on the way over 4 bytes an element; 9.1 was the most seen, of the reference's 64-bit integer words.
PEAK_OVER_INPUT = 12
STD, PROBABILITY, ALPHA = 0.5, 0.05, 0.3
STRENGTHS: dict[Kind, float | None] = {
    "gaussian": STD,
    "salt_and_pepper": PROBABILITY,
    "circular_shift": ALPHA,
    "optimal_q": None,
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class NoiseOptions:
    """Elements/s and GB/s of each noise. The reference is the specification, not fast code."""

    megabytes: float = 64
    """Size of the input, 10^6 bytes, in whole groups of 8 samples of 197 tokens of 768; at least one group."""
    rounds: int = 5
    """Timed rounds of each contestant."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    note: str = ""
    """Kept in each row, such as `2 CPU cores, shared`."""
    output: Path | None = None
    """JSON lines to add to; benchmarks/results/noise.jsonl if None."""

    def __post_init__(self) -> None:
        if not 0 < self.megabytes < math.inf:
            raise ValueError(f"--megabytes {self.megabytes}: a finite size above 0")
        if self.rounds < 1:
            raise ValueError(f"--rounds {self.rounds}: at least 1")


class Made(NamedTuple):
    """What a contestant makes of `x`; draws of different generators agree only in distribution."""

    noisy: Tensor
    x: Tensor
    random: bool


def measure_noises(options: NoiseOptions, command: Sequence[str]) -> list[Row]:
    """Measures, writes and prints. Errors: ValueError naming the option, where it cannot run here."""
    path = check_output(options.output, "noise")
    circumstances = circumstances_of(command, options.note)
    x = _input(options)
    conditions = {
        "shape": list(x.shape),
        "megabytes": x.numel() * x.element_size() / 1e6,
        "dtype": options.dtype,
        "device": x.device.type,
        "threads": torch.get_num_threads(),
        "strengths": STRENGTHS,
        "group_size": GROUP,
        "allocator": _keep_freed_memory(),
        "bytes_counted": "one read and one write of each element",
    }
    rows = []
    with status_line() as on_turn:
        for kind in STRENGTHS:
            contestants = _contestants(kind, x)
            timings = compare(contestants, options.rounds, agree, on_turn)
            rows += summarise("noise", kind, "elements", contestants, timings)
        contestants = _image_contestants(options, x.device)
        timings = compare(contestants, options.rounds, agree, on_turn)
        rows += summarise("noise", "image_noise, gaussian", "elements", contestants, timings)
    finish(rows, circumstances | {"conditions": conditions}, path)
    print("`reference` is the specification that kernels must meet, written to be plainly right; it is not fast code.")
    return rows


def _keep_freed_memory() -> str:
    """Has glibc keep what is freed, as tcmalloc, jemalloc and a GPU's allocator do, and says what holds.

    Otherwise each result of 64 MB is new to the process, and its page faults take twice as long as the noise.
    """
    trim_threshold, mmap_max, most = -1, -4, (1 << 31) - 1  # mallopt's names for them, from malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    kept = mallopt is not None and mallopt(mmap_max, 0) and mallopt(trim_threshold, most)
    return "freed memory is kept" if kept else "the system's: page faults included"


def _input(options: NoiseOptions) -> Tensor:
    """(B, 197, 768) of standard normals, B a multiple of the group."""
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: torch sees no GPU here; leave the option out to measure the CPU")
    device = "cuda" if has_gpu and options.device != "cpu" else "cpu"
    dtype = _DTYPES[options.dtype]
    sample_bytes = TOKENS * WIDTH * dtype.itemsize
    samples = max(GROUP, int(options.megabytes * 1e6) // sample_bytes // GROUP * GROUP)
    needed = samples * TOKENS * WIDTH * 4 * PEAK_OVER_INPUT
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        most = free / PEAK_OVER_INPUT * dtype.itemsize / 4 / 1e6
        raise ValueError(
            f"--megabytes {options.megabytes:g}: the reference takes up to {needed / 1e9:.1f} GB on the way and "
            f"{free / 1e9:.1f} GB are free; give at most {most:.0f}"
        )
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, TOKENS, WIDTH, generator=generator).to(device, dtype)


def _contestants(kind: Kind, x: Tensor) -> list[Contestant]:
    """Eager first: ratios are to what a user would write."""
    config = NoiseConfig(kind=kind, strength=STRENGTHS[kind], site="blocks.11.attn", group_size=GROUP)
    ids, epoch = torch.arange(len(x), device=x.device), torch.tensor(0, device=x.device)
    eager, expression = EAGER[kind]
    random = kind in ("gaussian", "salt_and_pepper")
    target = torch.empty_like(x)
    work: dict[str, tuple[Callable[[], Tensor], str]] = {
        "eager": (partial(eager, x), expression),
        "reference": (
            partial(reference.apply_noise, x, config, ids, 0, epoch),
            "pipeline/noise/reference.py: the specification, not fast code",
        ),
        "torch.compile": (partial(torch.compile(eager), x), f"torch.compile of {expression}"),
        "operator": (
            partial(ops.apply_noise, x, config, ids, 0, epoch),
            f"pipeline/noise/ops.py, {'kernels' if native.is_loaded(x.device.type) else 'NO KERNELS: the reference'}",
        ),
        "clone": (x.clone, "x.clone(): into new memory, as all others"),
        "copy": (partial(target.copy_, x), "target.copy_(x) into memory that is there already: the bound by bandwidth"),
    }
    return [
        Contestant(
            name=name,
            round=partial(_round, run, x),
            settings=settings,
            output=None if name in ("clone", "copy") else partial(_made, run, x, random),
            bytes_per_item=2 * x.element_size(),
        )
        for name, (run, settings) in work.items()
    ]


def _image_contestants(options: NoiseOptions, device: torch.device) -> list[Contestant]:
    """uint8 pictures of 224 pixels to the network's input: half mirrored, normalised, Gaussian noise."""
    dtype = _DTYPES[options.dtype]
    count = max(GROUP, int(options.megabytes * 1e6) // (3 * IMAGE_SIDE**2 * dtype.itemsize))
    generator = torch.Generator().manual_seed(0)
    shape = (count, IMAGE_SIDE, IMAGE_SIDE, 3)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    mean, std = (torch.tensor(value, device=device) for value in (IMAGE_MEAN, IMAGE_STD))
    flip = torch.arange(count, device=device) % 2 == 0
    config, ids, epoch = NoiseConfig(kind="gaussian", strength=STD), torch.arange(count, device=device), torch.tensor(0)

    def chain(pictures: Tensor) -> Tensor:
        x = pictures.permute(0, 3, 1, 2).float()
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
        x = (x / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        return (x + torch.randn_like(x) * STD).to(dtype).contiguous()

    plain = reference.image_noise(images, mean, std, NoiseConfig(), ids, 0, epoch, flip)
    expression = "permute, float, flip, / 255, - mean, / std, + torch.randn_like(x) * s"
    work: dict[str, tuple[Callable[[], Tensor], str]] = {
        "eager": (partial(chain, images), expression),
        "torch.compile": (partial(torch.compile(chain), images), f"torch.compile of {expression}"),
        "operator": (
            partial(ops.image_noise, images, mean, std, config, ids, 0, epoch, flip, dtype),
            f"pipeline/noise/ops.py, {'kernels' if native.is_loaded(device.type) else 'NO KERNELS: the reference'}",
        ),
    }
    return [
        Contestant(
            name=name,
            round=partial(_round, run, plain),
            settings=settings,
            output=partial(_made, run, plain, True),
            bytes_per_item=1 + dtype.itemsize,
        )
        for name, (run, settings) in work.items()
    ]


@torch.no_grad()
def _round(run: Callable[[], Tensor], x: Tensor) -> int:
    run()
    if x.is_cuda:
        torch.cuda.synchronize()
    return x.numel()


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
