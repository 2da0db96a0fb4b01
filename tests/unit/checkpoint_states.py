"""Training states made by hand: whole tensors, and the pieces of them that each of several ranks would hold."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoint import CheckpointConfig, CheckpointWriter
from pipeline.pieces import Piece

KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
SHAPES: dict[str, tuple[int, ...]] = {"stem.weight": (6, 3, 2), "norm.bias": (5,), "scale": (), "head.weight": (4, 7)}

Whole = dict[str, dict[str, Tensor]]  # name -> kind -> flat float32


def whole_state(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES, kinds: Iterable[str] = KINDS) -> Whole:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: {kind: torch.randn(torch.Size(shape).numel(), generator=draw) for kind in kinds}
        for name, shape in shapes.items()
    }


def cut(whole: Whole, cuts: dict[str, list[int]], ranks: int, shapes=SHAPES) -> list[list[Piece]]:
    """Each rank's pieces; `cuts[name]`: where the second, third, ... stretch begins, dealt out to the ranks in turn."""
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    for name, kinds in whole.items():
        elements = torch.Size(shapes[name]).numel()
        edges = [0, *sorted(cuts.get(name, [])), elements]
        for number, (start, stop) in enumerate(pairwise(edges)):
            tensors = {kind: flat[start:stop].clone() for kind, flat in kinds.items()}
            pieces[number % ranks].append(Piece(name, shapes[name], start, tensors))
    return pieces


def even(whole: Whole, ranks: int, shapes=SHAPES) -> list[list[Piece]]:
    """An even share by elements."""
    cuts = {}
    for name, shape in shapes.items():
        elements = torch.Size(shape).numel()
        cuts[name] = [elements * rank // ranks for rank in range(1, ranks)]
    return cut(whole, cuts, ranks, shapes)


def save_all(
    writers: list[CheckpointWriter], step: int, pieces: list[list[Piece]], score: float | None = None, **record: object
) -> list[str]:
    """One save by all ranks, waited for; returns what failed."""
    buffers = {"norm.running_mean": torch.arange(3.0), "norm.num_batches_tracked": torch.tensor(step)}
    body = {"step": step, "scalars": {"optimizer_steps": step}, **record}
    for writer, own in zip(writers, pieces, strict=True):
        writer.save(step, own, buffers, body, {"config.json": b'{"step": %d}\n' % step}, score)
    for writer in writers:
        assert writer.wait(60)
    return [line for writer in writers for line in writer.take_failures()]


def writers_of(run: Path, ranks: int = 1, **config: object) -> list[CheckpointWriter]:
    return [CheckpointWriter(run, CheckpointConfig(**config), rank, ranks) for rank in range(ranks)]


def save_one(run: Path, step: int, seed: int | None = None, **config: object) -> None:
    """A generation of one rank, of the state that `seed` (the step) gives."""
    whole = whole_state(step if seed is None else seed)
    assert save_all(writers_of(run, **config), step, even(whole, 1)) == []


def assert_holds(pieces: list[Piece], whole: Whole) -> None:
    for piece in pieces:
        for kind, tensor in piece.tensors.items():
            assert torch.equal(tensor, whole[piece.name][kind][piece.start : piece.start + tensor.numel()])
