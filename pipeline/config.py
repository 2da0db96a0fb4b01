"""A run's configuration: composes the sections that stand beside the code that reads them. And what a recipe is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.checkpoint import CheckpointConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.models import ModelConfig
from pipeline.noise.config import NoiseConfig
from pipeline.optim import OptimConfig
from pipeline.parallel import ParallelConfig


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    run: Path = Path("runs/train")
    """Folder for configuration, metrics, checkpoints and results."""
    resume: bool = False
    """Go on from the run folder's latest checkpoint; from the beginning where it has none."""
    epochs: int = 90
    global_batch: int = 1024
    """Samples a step, over all ranks."""
    micro_batch: int = 128
    """Samples a rank handles at once, at the most: the largest that divides its share; the rest is accumulated."""
    seed: int = 0
    label_smoothing: float = 0.0
    log_every: int = 10
    """Steps between two lines of metrics."""
    stop_after_steps: int | None = None
    """End early, with a checkpoint, after so many steps of the whole run; the schedule stays that of all epochs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch", "micro_batch", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: from 0 to 2^32 - 1, half of the key of every draw")
        if self.stop_after_steps is not None and self.stop_after_steps < 1:
            raise ValueError(f"stop_after_steps is {self.stop_after_steps}: at least 1, or None")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}: from 0 to below 1")


@dataclass(frozen=True)
class Recipe:
    """An experiment: its configuration, and what a person must know before starting it."""

    config: TrainConfig
    purpose: str
    source: str
    """Where the settings come from."""
    command: str
    hardware: str
    hours: str
    expected_top1: str
    """With its source, or "not measured"."""

    @property
    def summary(self) -> str:
        return f"{self.purpose} Hardware: {self.hardware}. Expected top-1: {self.expected_top1}"
