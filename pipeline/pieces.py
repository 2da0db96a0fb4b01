"""A training state in pieces: what a rank holds of each tensor, whatever the strategy. For engines and checkpoints.

Parameters are flattened, and each rank holds stretches of them in float32: an even share under DDP, its partition under
ZeRO. A checkpoint is the pieces of all ranks, so it can be loaded into any number of ranks and any strategy.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

WEIGHT, EMA = "weight", "ema"  # the other kinds are the optimiser's own names: exp_avg, exp_avg_sq, momentum_buffer


class Piece(NamedTuple):
    """Elements `start` to `start + n` of one flattened parameter, and what belongs to them."""

    name: str  # as timm's state_dict has it
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    tensors: dict[str, Tensor]  # kind -> (n,) float32, views of the live state: writing into them changes the state
