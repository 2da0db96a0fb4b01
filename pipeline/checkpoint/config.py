"""When checkpoints are written, where to, and how many stay."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, where to, and how many stay."""

    every_epochs: int = 1
    every_steps: int | None = None
    """Within epochs too, after each so many optimiser steps."""
    every_minutes: float | None = None
    """Within epochs too, after so much time since the last one."""
    keep: int = 2
    """The newest so many stay."""
    keep_best: int = 0
    """So many more stay that have the highest score (the validation's top-1 when they were written)."""
    folder: str | None = None
    """Where they lie: a folder of this run's own, or a URL that fsspec writes to. By default RUN/checkpoints."""
    part_timeout_seconds: float = 900.0
    """How long rank 0 waits in the background for the other ranks' parts before it gives a checkpoint up."""

    def __post_init__(self) -> None:
        if self.every_epochs < 1:
            raise ValueError(f"checkpoint.every_epochs is {self.every_epochs}: at least 1")
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"checkpoint.every_steps is {self.every_steps}: at least 1, or none")
        if self.every_minutes is not None and not 0 < self.every_minutes < math.inf:
            raise ValueError(f"checkpoint.every_minutes is {self.every_minutes}: more than 0, or none")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep is {self.keep}: at least 1, the newest is never removed")
        if self.keep_best < 0:
            raise ValueError(f"checkpoint.keep_best is {self.keep_best}: at least 0")
        if not 0 < self.part_timeout_seconds < math.inf:
            raise ValueError(f"checkpoint.part_timeout_seconds is {self.part_timeout_seconds}: give seconds, above 0")
        if self.folder == "":
            raise ValueError("checkpoint.folder is empty: name a folder or a URL, or leave it out")
