"""A rank's state copied into host memory: the one part of a save that training waits for."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import IO

import torch
from torch import Tensor

from pipeline.checkpoint.tensors import Entry, Written, all_finite, blocks, header_of, piece_key, raw, write_stream
from pipeline.pieces import EMA, WEIGHT, Piece


class NotFinite(ValueError):
    """A tensor of the state holds NaN or infinity."""


class Snapshot:
    """One host buffer for all of a rank's pieces, laid out as their file is, used again by each save.

    With a GPU its pages are locked, so that the copy runs at the bus's speed. They are locked as they are:
    `torch.empty(pin_memory=True)` would round a buffer up to a power of two.
    """

    def __init__(self) -> None:
        self.host = torch.empty(0)  # (n,) float32
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.buffers: dict[str, Tensor] = {}
        self._entries: list[Entry] = []
        self._ends: list[int] = []  # in elements
        self._pinned = False

    def prepare(self, pieces: list[Piece]) -> None:
        """Makes the buffer and touches its pages, so that the first save is as short as the later ones."""
        if self._make(pieces):
            self.host.zero_()

    def _make(self, pieces: list[Piece]) -> bool:
        """The buffer, unless it is there already. Returns whether it is new."""
        elements = sum(tensor.numel() for piece in pieces for tensor in piece.tensors.values())
        if elements == self.host.numel():
            return False
        self.release()
        self.host = torch.empty(elements)
        if any(tensor.is_cuda for piece in pieces for tensor in piece.tensors.values()):
            self._pin()
        return True

    def take(self, pieces: list[Piece], buffers: dict[str, Tensor]) -> None:
        """Copies the state; returns when the copy is whole, so that the next step may change what it was taken of."""
        self._make(pieces)
        self.shapes = {piece.name: tuple(piece.shape) for piece in pieces}
        self._entries, self._ends, end = [], [], 0
        cuda = False
        # The weights come first, so that who puts them together reads one stretch of the file.
        kinds = sorted({k for p in pieces for k in p.tensors}, key=lambda kind: (kind != WEIGHT, kind != EMA, kind))
        for kind in kinds:
            for piece in pieces:
                tensor = piece.tensors.get(kind)
                if tensor is None or tensor.numel() == 0:
                    continue
                start, end = end, end + tensor.numel()
                self.host[start:end].copy_(tensor.detach(), non_blocking=True)
                cuda |= tensor.is_cuda
                self._entries.append(Entry(piece_key(kind, piece.name, piece.start), torch.float32, (end - start,)))
                self._ends.append(end)
        self.buffers = {name: self._kept(name, tensor) for name, tensor in buffers.items()}
        if cuda:
            torch.cuda.synchronize()

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of a buffer, in the memory of the last one; halves as float32, which everybody reads."""
        half = tensor.is_floating_point() and tensor.itemsize < 4
        dtype = torch.float32 if half else tensor.dtype
        kept = self.buffers.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != dtype:
            kept = torch.empty(tensor.shape, dtype=dtype)
        return kept.copy_(tensor.detach())

    @property
    def nbytes(self) -> int:
        return self.host.nbytes

    @property
    def portable_bytes(self) -> int:
        """What of it goes into the weights for everybody as well."""
        return sum(entry.nbytes for entry in self._entries if entry.key.startswith((f"{WEIGHT}/", f"{EMA}/")))

    def write(self, file: IO[bytes], go_on: Callable[[], None]) -> Written:
        """The pieces as a safetensors file. Errors: NotFinite naming the tensor; OSError."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        header = header_of(self._entries, {"format": "pt", "shapes": json.dumps(shapes, separators=(",", ":"))})
        return write_stream(file, header, self._checked_blocks(), go_on)

    def _checked_blocks(self) -> Iterator[memoryview]:
        start = 0
        for block in blocks(raw(self.host)):
            if not all_finite(block):
                raise NotFinite(self._first_not_finite(start))
            start += len(block) // 4
            yield block

    def _first_not_finite(self, start: int) -> str:
        offset = start + int((~torch.isfinite(self.host[start:])).nonzero()[0])
        return self._entries[bisect_right(self._ends, offset)].key.rpartition("@")[0]

    def _pin(self) -> None:
        portable = 1
        code = torch.cuda.cudart().cudaHostRegister(self.host.data_ptr(), self.host.nbytes, portable)
        self._pinned = int(code) == 0  # a limit on locked memory makes the copy slower, not wrong

    def release(self) -> None:
        """Gives the buffer back."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.host.data_ptr())
            self._pinned = False
        self.host = torch.empty(0)
