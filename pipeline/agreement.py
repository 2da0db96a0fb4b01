"""What all ranks must decide alike, between two steps: whether to end, and whether to save.

A signal may reach one node only, and clocks differ; a rank that acted alone would leave the others waiting in a
collective. So each step carries a small reduction of its own, which runs beside the step's work.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Decision(NamedTuple):
    stop: int  # the signal that any rank was asked to end by, or 0
    save: bool  # whether any rank's clock says that a checkpoint is due


class Agreement:
    """Over gloo on the CPU, beside whatever the gradients take: a GPU is never waited for."""

    def __init__(self, world_size: int, timeout_seconds: float) -> None:
        self._group: Any = None
        self._work: Any = None
        self._flags = torch.zeros(2, dtype=torch.int64)
        if world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    def propose(self, stop: int, save: bool) -> None:
        """At the beginning of a step; returns at once."""
        self._flags = torch.tensor([stop, save], dtype=torch.int64)
        if self._group is not None:
            self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, self._group, async_op=True)

    def decided(self) -> Decision:
        """At its end, the same on all ranks: the largest of what each had proposed."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        stop, save = self._flags.tolist()
        return Decision(stop, bool(save))

    def now(self, stop: int, save: bool = False) -> Decision:
        """Proposes and waits."""
        self.propose(stop, save)
        return self.decided()
