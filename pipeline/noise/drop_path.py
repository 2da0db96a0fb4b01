"""Drop path (stochastic depth, Huang et al. 2016) keyed by sample: timm's arithmetic, Philox's masks.

timm draws from torch's generator, so that a mask depends on the rank and the micro-batch. Here it is a function of
(seed, epoch, sample id, site), as the noise is, and recomputing a block draws it again.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from pipeline.noise.ops import random_words
from pipeline.noise.reference import Purpose, stream_of


class KeyedDropPath(nn.Module):
    """In place of one timm DropPath; like it, it has no parameters and acts in training alone."""

    def __init__(self, of: DropPath, name: str, stream: int, keys: DropPathKeys) -> None:
        super().__init__()
        self.drop_prob = of.drop_prob
        self.scale_by_keep = of.scale_by_keep
        self.name = name
        self.stream = stream
        self._keys = [keys]  # in a list: keys are no part of the module
        self.train(of.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, ...). Errors: ValueError where its first axis is not the batch."""
        if not self.training or self.drop_prob == 0:
            return x
        keys = self._keys[0]
        assert keys.sample_ids is not None, "set_batch() was not called before the batch"
        if len(x) != len(keys.sample_ids):
            raise ValueError(
                f"drop path at {self.name}: {len(x)} rows, {len(keys.sample_ids)} sample ids; its first axis is not "
                "the batch: set model.drop_path to 0"
            )
        words = random_words(1, keys.sample_ids, keys.seed, keys.epoch, self.stream)
        # On integers, so that every device drops the same.
        mask = (words >= round(self.drop_prob * 2**32)).to(x.dtype)
        if self.scale_by_keep:
            mask = mask / (1 - self.drop_prob)
        return x * mask.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}, site={self.name}"


class DropPathKeys:
    """Replaces the model's drop paths, and holds what they draw by. Call `set_batch` before each batch of training."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.seed = seed
        self.sample_ids: Tensor | None = None
        self.epoch = torch.zeros((), dtype=torch.int64)  # a tensor: a compiled model would be compiled for each number
        taken: set[int] = set()
        for name, module in list(model.named_modules()):
            if not isinstance(module, DropPath):
                continue
            parent, _, own = name.rpartition(".")
            stream = _free_stream(name, taken)
            taken.add(stream)
            setattr(model.get_submodule(parent), own, KeyedDropPath(module, name, stream, self))

    def set_batch(self, sample_ids: Tensor, epoch: int) -> None:
        """sample_ids: int64 (B,), on the model's device."""
        self.sample_ids = sample_ids
        if self.epoch.device != sample_ids.device:
            self.epoch = self.epoch.to(sample_ids.device)
        self.epoch.fill_(epoch)


def _free_stream(name: str, taken: set[int]) -> int:
    """24 bits of two names' hashes may be equal: then the later one is hashed under another."""
    while (stream := stream_of(name, Purpose.DROP_PATH)) in taken:
        name += "'"
    return stream
