"""Features before a noise's place: computed once, kept in a file that is mapped into memory, gone when it is closed."""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FLOAT_BYTES = 4


class Features:
    """float32 (n, *shape) for each place. The files have no name: they go with the process, however it ends."""

    def __init__(self, n: int, shapes: Mapping[int, tuple[int, ...]], folder: Path) -> None:
        """shapes: of one picture's features, by place. Errors: OSError naming the folder where it has no room."""
        self._arrays = {place: _mapped((n, *shape), folder) for place, shape in shapes.items()}

    def put(self, place: int, sample_ids: np.ndarray, x: Tensor) -> None:
        """x: float32 (B, *shape), on any device."""
        self._arrays[place][sample_ids] = x.cpu().numpy()

    def get(self, place: int, sample_ids: np.ndarray) -> Tensor:
        """float32 (B, *shape), a copy on the CPU."""
        return torch.from_numpy(np.asarray(self._arrays[place][sample_ids]))

    def close(self) -> None:
        """Gives the disk's room back."""
        self._arrays.clear()


def _mapped(shape: tuple[int, ...], folder: Path) -> np.ndarray:
    """float32, of a new file in `folder` that has no name and lasts as long as the array."""
    needed_bytes = _FLOAT_BYTES * math.prod(shape)
    descriptor, name = tempfile.mkstemp(prefix=".features-", dir=folder)
    try:
        os.unlink(name)
        os.posix_fallocate(descriptor, 0, needed_bytes)  # a hole that finds no room later would end the process
        mapped = mmap.mmap(descriptor, needed_bytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise no_room(folder, needed_bytes) from error
    finally:
        os.close(descriptor)
    return np.frombuffer(mapped, np.float32).reshape(shape)


def bytes_of(n: int, shapes: Sequence[tuple[int, ...]]) -> int:
    """Of the files of n pictures."""
    return _FLOAT_BYTES * n * sum(map(math.prod, shapes))


def check_room(folder: Path, needed_bytes: int) -> None:
    """Errors: OSError naming the folder and the mend."""
    if shutil.disk_usage(folder).free < needed_bytes:
        raise no_room(folder, needed_bytes)


def no_room(folder: Path, needed_bytes: int) -> OSError:
    free = shutil.disk_usage(folder).free
    return OSError(
        errno.ENOSPC,
        f"the features need {needed_bytes / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free: name a larger disk with "
        "--scratch, or fewer --sites",
        str(folder),
    )
