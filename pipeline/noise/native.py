"""Loads the kernels that `make setup` built from csrc/. Without them noise is reference.py's, and one line says so."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent / "csrc"
_LIBRARIES = {"cpu": _FOLDER / "libnoisynn_cpu.so", "cuda": _FOLDER / "libnoisynn_cuda.so"}
_MEND = "run `make setup`; until then noise is plain PyTorch, some 30 times slower"


@cache
def is_loaded(device_type: str) -> bool:
    """Whether there are kernels for tensors of this device type; loads them at the first call.

    The CUDA library needs CUDA's own libraries, so it is not even tried where torch has none.
    """
    path = _LIBRARIES.get(device_type)
    if path is None or (device_type == "cuda" and not torch.cuda.is_available()):
        return False
    if not path.is_file():
        print(f"NO NOISE KERNELS for {device_type}: {path.name} is not built: {_MEND}", file=sys.stderr)
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        print(f"NO NOISE KERNELS for {device_type}: {path} cannot be loaded ({error}): {_MEND}", file=sys.stderr)
        return False
    return True
