"""Every operator once, on small and odd shapes, under each tool of compute-sanitizer. Run by `make gpu PART=check`.

With --once it only runs them, which is what the tools are given to watch.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipeline.noise import native, ops  # noqa: E402  (a script finds the packages no other way)
from pipeline.noise.config import NoiseConfig  # noqa: E402

CONFIGS = (
    NoiseConfig(kind="gaussian", strength=0.7, site="blocks.1"),
    NoiseConfig(kind="salt_and_pepper", strength=0.3, site="blocks.1", group_size=2),
    NoiseConfig(kind="circular_shift", strength=0.3, site="blocks.1", group_size=3),
    NoiseConfig(kind="optimal_q", site="blocks.1", group_size=3),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the last each thread takes two units.
SHAPES = ((5, 7, 3), (2, 1, 127), (4, 5, 64), (3, 6, 5, 7), (1, 1, 1), (4096, 4, 1024))
LARGE_GROUP = 14  # more rows than a thread holds
WIDTHS = (8, 384, 1024)  # of a row: one unit, and both of the sizes that a warp holds
# initcheck must see who writes, so all kernels are watched; torch's own are none of the others' business.
OURS = ("--kernel-name", "kns=noisynn")
TOOLS = {"memcheck": OURS, "racecheck": OURS, "initcheck": (), "synccheck": OURS}


def values(*shape: int, dtype: torch.dtype) -> Tensor:
    """Made on the CPU, so that no kernel but ours runs before."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to("cuda")


def run_once() -> int:
    if not native.is_loaded("cuda"):
        return 2
    epoch = torch.tensor(3, device="cuda")

    def ids(x: Tensor) -> Tensor:
        return torch.arange(len(x)).to("cuda")

    for config, dtype, shape in itertools.product(CONFIGS, DTYPES, SHAPES):
        x = values(*shape, dtype=dtype)
        layouts = [x] if len(shape) < 4 else [x, x.to(memory_format=torch.channels_last), x[:, :, 1:, ::2]]
        for layout, first_token in itertools.product(layouts, (0, 1)):
            leaf = layout.detach().requires_grad_()
            ops.apply_noise(leaf, config, ids(x), 7, epoch, first_token).backward(torch.ones_like(layout))
    for kind, dtype in itertools.product(("circular_shift", "optimal_q"), DTYPES):
        strength = 0.3 if kind == "circular_shift" else None
        config = NoiseConfig(kind=kind, strength=strength, site="blocks.1", group_size=LARGE_GROUP)
        leaf = values(LARGE_GROUP + 3, 3, 40, dtype=dtype).requires_grad_()
        ops.apply_noise(leaf, config, ids(leaf), 7, epoch, 1).sum().backward()
    for config, dtype, width in itertools.product(CONFIGS, DTYPES, WIDTHS):
        x, weight, bias = values(4, 5, width, dtype=dtype), values(width, dtype=dtype), values(width, dtype=dtype)
        leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
        ops.norm_noise(*leaves, 1e-6, config, ids(x), 7, epoch, 1).backward(values(4, 5, width, dtype=dtype))
    mean, std = (torch.tensor(numbers).to("cuda") for numbers in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    # 8: rows are whole stretches, in planes and in pixels; 7 and 33: in pieces.
    for side, config, dtype in itertools.product((8, 7, 33), (NoiseConfig(), *CONFIGS), DTYPES):
        images = torch.arange(5 * side * side * 3, dtype=torch.uint8).view(5, side, side, 3).to("cuda")
        flip = torch.tensor([True, False, True, False, True]).to("cuda")
        for memory_format in (torch.contiguous_format, torch.channels_last):
            ops.image_noise(images, mean, std, config, ids(images), 7, epoch, flip, dtype, memory_format)
    torch.cuda.synchronize()
    return 0


def sanitizer() -> str | None:
    """Of the path, or beside nvcc."""
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parent if nvcc else None
    return shutil.which("compute-sanitizer") or (shutil.which("compute-sanitizer", path=beside) if beside else None)


def main() -> int:
    """Runs all tools; returns the exit status: 0 clean, or nothing to run it with; 1 a fault."""
    if (tool := sanitizer()) is None:
        print("compute-sanitizer is not found, so memory and races were not checked: CUDA's toolkit brings it")
        return 0
    # Without torch's cache of memory, what lies behind a tensor is nobody's, and a step over its end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    faults = 0
    for name, filters in TOOLS.items():
        start = time.monotonic()
        words = [tool, "--tool", name, *filters, "--error-exitcode", "1", sys.executable, __file__, "--once"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        print(f"{name}: {'clean' if done.returncode == 0 else 'FAULTS'}, {time.monotonic() - start:.0f} s", flush=True)
        if done.returncode:
            faults += 1
            print("\n".join((done.stdout + done.stderr).splitlines()[-60:]))
    return int(faults > 0)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("error: torch sees no GPU here", file=sys.stderr)
        sys.exit(2)
    sys.exit(run_once() if "--once" in sys.argv[1:] else main())
