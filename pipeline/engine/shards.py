"""A rank's part of the training state, the same for every strategy: pieces out, whole tensors on request."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeline.data.order import Layout
from pipeline.engine.ema import Ema
from pipeline.engine.states import by_element, set_step_count, step_count
from pipeline.engine.stretches import Stretch, from_rank_0, gather
from pipeline.pieces import EMA, WEIGHT, Piece

_STEPS, _UPDATES = "optimizer_steps", "ema_updates"


class Shards:
    """The stretches that this rank owns, with what belongs to them."""

    def __init__(
        self,
        stretches: list[Stretch],
        optimizer: Optimizer,
        buffers: dict[str, Tensor],
        keys: list[str],
        layout: Layout,
        device: torch.device,
        ema_decay: float | None,
    ) -> None:
        """buffers: what a state_dict holds beside the trainable parameters, on each rank whole. keys: its order."""
        self.stretches = stretches
        self.optimizer = optimizer
        self.buffers = buffers
        self._keys = keys
        self.world_size = layout.world_size
        self.device = device
        self.ema = Ema(ema_decay, stretches) if ema_decay is not None else None

    def pieces(self) -> list[Piece]:
        found = []
        for index, stretch in enumerate(self.stretches):
            tensors = {WEIGHT: stretch.of(stretch.owner)}
            states = by_element(self.optimizer, stretch.owner)
            tensors |= {name: stretch.of(state) for name, state in states.items()}
            if self.ema is not None:
                tensors[EMA] = self.ema.averages[index]
            found.append(Piece(stretch.name, stretch.shape, stretch.start, tensors))
        return found

    def gather(self, kind: str) -> dict[str, Tensor]:
        """Collective. Whole float32 tensors on the CPU, of the parameters that have this kind.

        Errors: ValueError where there is no such kind.
        """
        pieces = self.pieces()
        held = [index for index, piece in enumerate(pieces) if kind in piece.tensors]
        tensors = [pieces[index].tensors[kind] for index in held]
        found = gather([self.stretches[index] for index in held], tensors, self.world_size, self.device)
        if not found:  # one rank may have none: Muon keeps other states of matrices than of the rest
            raise ValueError(f"the state has no {kind!r}: it has {', '.join(pieces[0].tensors)}")
        return found

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Collective. A state_dict's tensors on the CPU, rank 0's buffers; floats in float32."""
        buffers = {name: buffer.detach().clone() for name, buffer in self.buffers.items()}
        from_rank_0(buffers.values(), self.world_size, self.device)
        floats = {name: value.float() if value.is_floating_point() else value for name, value in buffers.items()}
        found = self.gather(kind) | {name: value.cpu() for name, value in floats.items()}
        return {key: found[key] for key in self._keys}

    def scalars(self) -> dict[str, float | int]:
        found: dict[str, float | int] = {_STEPS: step_count(self.optimizer)}
        return found if self.ema is None else found | {_UPDATES: self.ema.updates}

    def load_scalars(self, scalars: dict[str, float | int]) -> None:
        set_step_count(self.optimizer, int(scalars[_STEPS]))
        if self.ema is not None:
            self.ema.updates = int(scalars[_UPDATES])
