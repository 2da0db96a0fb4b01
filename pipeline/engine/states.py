"""What an optimiser keeps: by element, which goes into pieces, and its counts, which are the same everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_STEP = "step"  # of torch's optimisers by tensor, of timm's LAMB by group


@torch.no_grad()
def create_states(optimizer: Optimizer, owners: list[list[Tensor]]) -> None:
    """Makes the states that an optimiser else makes in its first step, as they are before it: zeros.

    owners: for each parameter group what it steps. A step at rate 0 on gradients of 0 changes no weight; what weight
    decay leaves in a momentum, and the count, are set back.
    """
    saved = [dict(group) for group in optimizer.param_groups]
    gradients = [(tensor, tensor.grad) for tensors in owners for tensor in tensors]  # offload keeps buffers there
    for group, tensors in zip(optimizer.param_groups, owners, strict=True):
        group["params"], group["lr"] = tensors, 0.0
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    for group, before in zip(optimizer.param_groups, saved, strict=True):
        made = {key: torch.zeros_like(value) for key, value in group.items() if key not in before}
        group.update(before | made)
    for tensor, gradient in gradients:
        tensor.grad = gradient
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def by_element(optimizer: Optimizer, owner: Tensor) -> dict[str, Tensor]:
    """The states that have an owner's shape."""
    state = optimizer.state[owner].items()
    return {name: value for name, value in state if isinstance(value, Tensor) and value.shape == owner.shape}


def _counts(optimizer: Optimizer) -> list[Tensor]:
    holders: list[dict[str, Any]] = [*optimizer.state.values(), *optimizer.param_groups]
    return [holder[_STEP] for holder in holders if _STEP in holder]


def step_count(optimizer: Optimizer) -> int:
    """Steps that the optimiser has taken; 0 for one that does not count."""
    counts = {int(count) for count in _counts(optimizer)}
    assert len(counts) <= 1, f"parameters were stepped {sorted(counts)} times, not all as often"
    return counts.pop() if counts else 0


def set_step_count(optimizer: Optimizer, steps: int) -> None:
    for count in _counts(optimizer):
        count.fill_(steps)
