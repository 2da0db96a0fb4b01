"""Run by torchrun: python engine_checks.py FOLDER CHECK. Rank 0 writes what it found into FOLDER/CHECK.json."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn import functional

from pipeline.data.order import Layout
from pipeline.engine import create_engine
from pipeline.parallel import ParallelConfig, leave

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
BATCH, CLASSES, TIMEOUT = 8, 5, 123.0
OPTIMIZERS: dict[str, dict[str, Any]] = {"adamw": {}, "sgd": {"momentum": 0.9}}


class Run:
    """A small ViT in an engine, on pictures that depend on the step alone."""

    def __init__(self, strategy: str, accumulation: int = 1, optimizer: str = "adamw", frozen: bool = False, **options):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # a real run makes one engine only
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        torch.manual_seed(0)
        # Wide enough for matrices of over 100,000 elements: smaller ones ZeRO-3 keeps whole on each rank.
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 192, "num_heads": 3, "depth": 1}
        self.model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **sizes)
        if frozen:
            self.model.patch_embed.requires_grad_(False)
        self.start = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.accumulation, self.micro = accumulation, BATCH // WORLD // accumulation
        steps = create_optimizer_v2(self.model, opt=optimizer, lr=1e-3, weight_decay=0.05, **OPTIMIZERS[optimizer])
        config = ParallelConfig(**{"strategy": strategy, "precision": "fp32", "timeout_seconds": TIMEOUT} | options)
        layout = Layout(RANK, WORLD, self.micro, accumulation)
        self.engine = create_engine(self.model, steps, config, layout, 1.0, 0.9)

    def train(self, first: int, count: int, times: float = 1.0, plus: float = 0.0) -> list[list[float]]:
        """[loss over all ranks, applied, gradient norm] of each step. times, plus: done to the last rank's loss."""
        self.engine.module.train()
        found = []
        for step in range(first, first + count):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(BATCH, 3, 16, 16, generator=generator), torch.arange(BATCH) % CLASSES
            total = torch.zeros(())
            for part in range(self.accumulation):
                at = slice(begin := (RANK * self.accumulation + part) * self.micro, begin + self.micro)
                loss = functional.cross_entropy(self.engine.module(x[at]).float(), y[at])
                total += loss.detach() / self.accumulation / WORLD
                loss = loss * times + plus if RANK == WORLD - 1 else loss
                self.engine.backward(loss, part == self.accumulation - 1)
            dist.all_reduce(total)
            taken = self.engine.step()
            found.append([total.item(), taken.applied, taken.grad_norm])
        return found

    def state(self) -> list[dict[str, Tensor]]:
        return [{kind: tensor.clone() for kind, tensor in piece.tensors.items()} for piece in self.engine.pieces()]

    def whole(self) -> dict[str, dict[str, Tensor]]:
        return {kind: self.engine.full_weights(kind) for kind in ("weight", "ema", "exp_avg", "exp_avg_sq")}

    def fill(self, whole: dict[str, dict[str, Tensor]], scalars: dict[str, float | int]) -> Run:
        for piece in self.engine.pieces():
            for kind, tensor in piece.tensors.items():
                tensor.copy_(whole[kind][piece.name].view(-1)[piece.start : piece.start + len(tensor)])
        self.engine.load_scalars(scalars)
        self.engine.loaded()
        return self


def same(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    """On all ranks."""
    equal = all(torch.equal(a[kind], b[kind]) for a, b in zip(first, second, strict=True) for kind in a | b)
    everywhere = torch.tensor(int(equal))
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere)


def exactness(folder: Path) -> dict:
    """Each strategy against itself stopped and resumed, and ddp's state in all of them."""
    found: dict[str, Any] = {}
    for strategy in STRATEGIES:
        run = Run(strategy)
        losses = run.train(0, 3)
        state, scalars, whole = run.state(), run.engine.scalars(), run.whole()
        if strategy == "ddp":
            shared, shared_scalars = whole, scalars
            torch.save((whole, scalars), folder / "step_3.pt")
        rest = run.train(3, 3)
        resumed = Run(strategy)
        for piece, tensors in zip(resumed.engine.pieces(), state, strict=True):
            for kind, tensor in tensors.items():
                piece.tensors[kind].copy_(tensor)
        resumed.engine.load_scalars(scalars)
        resumed.engine.loaded()
        moved = Run(strategy).fill(shared, shared_scalars)
        found[strategy] = {
            "losses": [loss for loss, *_ in losses + rest],
            "scalars": scalars,
            "resumed": resumed.train(3, 3) == rest and same(resumed.state(), run.state()),
            "from_ddp": [loss for loss, *_ in moved.train(3, 10)],
            "elements": [len(tensors["weight"]) for tensors in state],
            "keys": list(whole["weight"]) == list(run.start),
            "bad": bad_steps(run),
            "timeouts": timeouts(),
            "obeys_rates": obeys_rates(run),
        }
    return found


def timeouts() -> list[float]:
    """Seconds, of each process group."""
    groups = torch.distributed.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def obeys_rates(run: Run) -> bool:
    """Whether a rate that is set from outside, as a schedule does, is the one of the next step."""
    before = run.engine.full_weights()
    for group in run.engine.optimizer.param_groups:
        group["lr"] = 0.0
    run.train(9, 1)
    after = run.engine.full_weights()
    return all(torch.equal(after[name], value) for name, value in before.items())


def bad_steps(run: Run) -> dict:
    """NaN, then an infinite loss of finite gradients, on one rank only."""
    before, scalars = run.state(), run.engine.scalars()
    taken = [run.train(6, 1, **spoilt)[0] for spoilt in ({"times": math.nan}, {"plus": math.inf})]
    unchanged = same(before, run.state()) and run.engine.scalars() == scalars
    after = run.train(6, 1)[0][1] and not same(before, run.state())
    return {
        "applied": [applied for _, applied, _ in taken],
        "finite": [math.isfinite(norm) for *_, norm in taken],
        "unchanged": unchanged,
        "goes_on": after,
    }


def options(folder: Path) -> dict:
    """Accumulation, SGD, offload, recomputation, 16 bits and frozen parameters, each beside ddp."""
    tried: dict[str, dict[str, Any]] = {
        "plain": {},
        "accumulated": {"accumulation": 4},
        "sgd": {"optimizer": "sgd"},
        "offload": {"offload": True, "accumulation": 2},
        "recomputed": {"activation_checkpointing": True},
        "bf16": {"precision": "bf16", "accumulation": 2},
    }
    found: dict[str, Any] = {}
    for name, given in tried.items():
        for strategy in STRATEGIES:
            if not (name == "offload" and strategy == "ddp"):
                found[f"{name} {strategy}"] = [loss for loss, *_ in Run(strategy, **given).train(0, 3)]
    found["reduced"] = reduced_by_micro_batch()
    return found | {f"frozen {strategy}": frozen_in_bf16(strategy) for strategy in STRATEGIES}


def frozen_in_bf16(strategy: str) -> dict:
    """float32 of the frozen and of the masters survives 16-bit running weights; a loaded one reaches those."""
    run = Run(strategy, frozen=True, precision="bf16")
    exact = all(torch.equal(value, run.start[name]) for name, value in run.engine.full_weights().items())
    run.train(0, 1)
    before = shown(run)
    names = [name for name in run.engine.buffers() if name.startswith("patch_embed")]
    kept = all(torch.equal(run.engine.full_weights()[name], run.start[name]) for name in names)
    for name in names:
        if RANK == 0:  # whose count
            run.engine.buffers()[name].fill_(0.25)
    run.engine.loaded()
    loaded = all(bool((run.engine.full_weights()[name] == 0.25).all()) for name in names)
    pieces = {piece.name for piece in run.engine.pieces()}
    apart = bool(names) and not any(name.startswith("patch_embed") for name in pieces)
    return {"exact": exact, "kept": kept, "loaded": loaded, "apart": apart, "seen": shown(run) != before}


def shown(run: Run) -> list[float]:
    """What the running weights make of one picture."""
    with torch.no_grad():
        return run.engine.module(torch.ones(1, 3, 16, 16)).flatten().tolist()


def reduced_by_micro_batch() -> list[bool]:
    """Whether all ranks hold the same gradients after each of two micro-batches."""
    run, found = Run("ddp", accumulation=2), []
    for last in (False, True):
        run.engine.backward(run.engine.module(torch.randn(2, 3, 16, 16) * (RANK + 1)).square().mean(), last)
        own = run.model.head.weight.grad
        everywhere = [torch.empty_like(own) for _ in range(WORLD)]
        dist.all_gather(everywhere, own)
        found.append(all(torch.equal(own, other) for other in everywhere))
    return found


def other_world_size(folder: Path) -> dict:
    """What two ranks left under ddp, gone on with by this number of ranks."""
    whole, scalars = torch.load(folder / "step_3.pt", weights_only=True)
    return {strategy: [loss for loss, *_ in Run(strategy).fill(whole, scalars).train(3, 10)] for strategy in STRATEGIES}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for check in sys.argv[2:]:
        result = {"exactness": exactness, "options": options, "other_world_size": other_world_size}[check](folder)
        if RANK == 0:
            (folder / f"{check}.json").write_text(json.dumps(result))
    dist.barrier()
    leave(0)
