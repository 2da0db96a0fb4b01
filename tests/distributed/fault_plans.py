"""Seeded plans of faults for a training run.

A plan is a list of starts of one run: its strategy, how many ranks, which fault meets them where, and what befalls the
checkpoints before the next start. The last start has no fault, so each plan ends with a finished run.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
SIGNALS = ("sigterm_all", "sigterm_one", "sigusr1_all", "sigusr1_one")
DEATHS = ("sigkill_one",)
HANGS = ("sleep_one", "sigstop_one")
INSIDE = ("nan_one", "disk_full")
AFTERWARDS = ("bit_flip", "truncate")
PHASES = ("build", "train", "validate", "save")


@dataclass(frozen=True)
class Start:
    world_size: int
    fault: str | None = None
    phase: str = "train"
    step: int = 0  # the phase's first at or after this step
    delay_seconds: float = 0.0  # from the phase's beginning to a signal
    rank: int = 0  # whom it meets, where it meets one
    afterwards: str | None = None  # to the newest generation


@dataclass(frozen=True)
class Plan:
    seed: int
    strategy: str
    starts: tuple[Start, ...] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_of(seed: int, steps: int) -> Plan:
    """Each seed meets another kind of fault first, so that few plans try all of them; the rest is drawn."""
    draw = random.Random(seed)
    kinds = [(fault, phase) for fault in SIGNALS + DEATHS for phase in PHASES]
    kinds += [(fault, "train") for fault in HANGS + INSIDE] + [("sigkill_one", "flip"), ("sigterm_all", "flip")]
    fault, phase = kinds[seed % len(kinds)]
    starts = [_start(draw, fault, phase, steps)]
    if draw.random() < 0.3:  # and another one after the resume
        starts.append(_start(draw, *draw.choice(kinds[:20]), steps))
    strategy = STRATEGIES[seed % 4] if draw.random() < 0.5 else draw.choice(STRATEGIES)
    return Plan(seed, strategy, (*starts, Start(starts[-1].world_size if draw.random() < 0.7 else 1)))


def _start(draw: random.Random, fault: str, phase: str, steps: int) -> Start:
    afterwards = draw.choice(AFTERWARDS) if phase == "flip" else None
    ranks = 2 if fault.endswith("_one") or draw.random() < 0.8 else 1
    return Start(
        world_size=ranks,
        fault=fault,
        phase="train" if phase == "flip" else phase,
        # A flip needs two generations to fall back from the newer.
        step=draw.randrange(steps * 2 // 3, steps - 1) if phase == "flip" else draw.randrange(0, steps - 2),
        delay_seconds=draw.choice((0.0, draw.uniform(0, 0.3))),
        rank=draw.randrange(ranks),
        afterwards=afterwards,
    )
