"""What every reader hands on, and what every reader is."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


class Batch(NamedTuple):
    images: Tensor  # uint8 (B, H, W, 3)
    labels: Tensor  # int64 (B,)
    sample_ids: Tensor  # int64 (B,)


class Reader(Protocol):
    """Random access to one split. The sample id is the index in the manifest's order."""

    labels: np.ndarray  # int64 (n,), after the label map
    classes: tuple[str, ...]  # after the label map

    def batch(self, sample_ids: np.ndarray, epoch: int | None) -> Batch:
        """Reads and augments; `epoch=None` applies the evaluation transform."""
        ...
