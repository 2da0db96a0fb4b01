"""Stretches of flattened parameters that a rank owns, and what gathers them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Stretch(NamedTuple):
    """Elements `start` to `start + length` of a parameter; they lie from `offset` in `owner` and what is like it."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    length: int
    owner: Tensor  # float32, contiguous: what the optimiser steps, and the key of its state
    offset: int

    def of(self, like_owner: Tensor) -> Tensor:
        """(length,) view of the owner or of a state of its shape."""
        return like_owner.detach().view(-1)[self.offset : self.offset + self.length]


def even_share(parameters: Iterable[tuple[str, Tensor]], rank: int, world_size: int) -> list[Stretch]:
    """This rank's share by elements of parameters that all ranks hold whole."""
    parameters = list(parameters)
    total = sum(parameter.numel() for _, parameter in parameters)
    share = -(-total // world_size)
    found, first = [], rank * share
    for name, parameter in parameters:
        start, stop = max(first, 0), min(first + share, parameter.numel())
        if start < stop and first + share > 0:
            found.append(Stretch(name, tuple(parameter.shape), start, stop - start, parameter, start))
        first -= parameter.numel()
    return found


def gather(stretches: list[Stretch], tensors: list[Tensor], world_size: int, device: torch.device) -> dict[str, Tensor]:
    """Collective. Parameters' names -> whole float32 tensors on the CPU, of what all ranks hold of them.

    tensors: (length,) for each stretch. One rank after another broadcasts all that it has, from `device`, so that no
    device holds more than a rank's share at once.
    """
    places: list[list[tuple[str, tuple[int, ...], int, int]]] = [[] for _ in range(world_size)]
    own = [(stretch.name, stretch.shape, stretch.start, stretch.length) for stretch in stretches]
    if world_size > 1:
        dist.all_gather_object(places, own)
    else:
        places = [own]
    whole: dict[str, Tensor] = {}
    for source, held in enumerate(places):
        buffer = _broadcast(tensors, sum(length for *_, length in held), source, world_size, device)
        for (name, shape, start, length), part in zip(held, buffer.split([n for *_, n in held]), strict=True):
            if name not in whole:
                whole[name] = torch.empty(shape, dtype=torch.float32)
            whole[name].view(-1)[start : start + length].copy_(part)
    return whole


def _broadcast(tensors: list[Tensor], count: int, source: int, world_size: int, device: torch.device) -> Tensor:
    if world_size == 1 or source == dist.get_rank():
        parts = [tensor.detach().to(device) for tensor in tensors]
        buffer = torch.cat(parts) if parts else torch.empty(0, device=device)
    else:
        buffer = torch.empty(count, device=device)
    if world_size > 1:
        dist.broadcast(buffer, source)
    return buffer.cpu()


def from_rank_0(tensors: Iterable[Tensor], world_size: int, device: torch.device) -> None:
    """Collective: overwrites each tensor with rank 0's."""
    if world_size == 1:
        return
    for tensor in tensors:
        moved = tensor.detach().to(device).contiguous()
        dist.broadcast(moved, 0)
        tensor.detach().copy_(moved)
