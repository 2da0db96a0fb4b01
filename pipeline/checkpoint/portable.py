"""Weights for everybody, put together from the parts of all ranks, block by block."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.checkpoint.tensors import (
    BLOCK_BYTES,
    Entry,
    blocks,
    header_of,
    parse_key,
    raw,
    read_header,
)


class Parts(Protocol):
    """Where parts can be read from."""

    def read(self, name: str, start: int, end: int) -> bytes: ...


class Stretch(NamedTuple):
    """Elements `start` to `stop` of a flattened tensor, and the bytes of a part that hold them."""

    start: int
    stop: int
    part: str
    offset: int


class Portable:
    """Which bytes of which part make up each weight. Reads the parts' headers once, for all kinds."""

    def __init__(self, draft: Parts, parts: list[str]) -> None:
        self._draft = draft
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stretches: dict[tuple[str, str], list[Stretch]] = {}
        for part in parts:
            header, begin = read_header(functools.partial(draft.read, part))
            metadata = header.pop("__metadata__")
            self.shapes |= {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            for key, entry in header.items():
                kind, name, start = parse_key(key)
                stretch = Stretch(start, start + entry["shape"][0], part, begin + entry["data_offsets"][0])
                self._stretches.setdefault((kind, name), []).append(stretch)

    def kinds(self) -> set[str]:
        return {kind for kind, _ in self._stretches}

    def file(self, kind: str, buffers: dict[str, Tensor]) -> tuple[bytes, Iterator[memoryview | bytes]]:
        """Header and data of a safetensors file by timm's names: parameters in float32, and rank 0's buffers.

        Errors: ValueError where the parts do not hold each element exactly once.
        """
        assert not (both := buffers.keys() & self.shapes.keys()), f"{sorted(both)[:3]} are parameters and buffers"
        entries = [Entry(name, torch.float32, shape) for name, shape in self.shapes.items()]
        entries += [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in buffers.items()]
        entries.sort(key=lambda entry: entry.key)
        pieces = {name: self._all_of(kind, name) for name in self.shapes}
        metadata = {"format": "pt", "buffers": json.dumps(sorted(buffers))}
        return header_of(entries, metadata), self._data(entries, pieces, buffers)

    def covering(self, kind: str, name: str, start: int, stop: int) -> list[Stretch] | None:
        """The stretches that hold elements `start` to `stop`, in order; None unless they hold each exactly once."""
        touching = sorted(s for s in self._stretches.get((kind, name), []) if s.start < stop and s.stop > start)
        end = start
        for number, stretch in enumerate(touching):
            if stretch.start > end or (number and stretch.start != end):
                return None
            end = stretch.stop
        return touching if end >= stop else None

    def _all_of(self, kind: str, name: str) -> list[Stretch]:
        elements = torch.Size(self.shapes[name]).numel()
        stretches = self.covering(kind, name, 0, elements)
        if stretches is None or (stretches and stretches[-1].stop != elements):
            raise ValueError(f"the ranks' pieces of {kind} {name} do not hold each of its {elements:,} elements once")
        return stretches

    def _data(
        self, entries: list[Entry], pieces: dict[str, list[Stretch]], buffers: dict[str, Tensor]
    ) -> Iterator[memoryview | bytes]:
        for entry in entries:
            if entry.key in buffers:
                yield from blocks(raw(buffers[entry.key]))
            for stretch in pieces.get(entry.key, []):
                end = stretch.offset + 4 * (stretch.stop - stretch.start)
                for start in range(stretch.offset, end, BLOCK_BYTES):
                    yield self._draft.read(stretch.part, start, min(start + BLOCK_BYTES, end))


def part_name(rank: int, world_size: int) -> str:
    return f"state/rank-{rank:05d}-of-{world_size:05d}.safetensors"
