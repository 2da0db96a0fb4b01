"""A run's configuration: composes the sections that stand beside the code that reads them. And what a recipe is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.checkpoint import CheckpointConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.loss import LossConfig
from pipeline.models import ModelConfig
from pipeline.noise.config import NoiseConfig
from pipeline.optim import OptimConfig
from pipeline.parallel import ParallelConfig


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    run: Path = Path("runs/train")
    """Folder for configuration, metrics, checkpoints and results."""
    resume: str = "auto"
    """`auto` goes on from the newest whole checkpoint, from the beginning where there is none; `never` refuses a run
    folder that has one; or the path of a checkpoint."""
    epochs: int = 90
    samples: int | None = None
    """Length in samples instead of epochs, rounded down to whole steps."""
    global_batch: int = 1024
    """Samples a step, over all ranks."""
    micro_batch: int | Literal["auto"] = 128
    """Samples a rank handles at once, at the most: the largest that divides its share; the rest is accumulated.
    `auto` tries downwards until a step fits into memory."""
    seed: int = 0
    label_smoothing: float = 0.0
    loss: LossConfig = field(default_factory=LossConfig)
    log_every: int = 10
    """Steps between two lines of metrics."""
    evaluate_every_epochs: int = 1
    """And at the end."""
    stop_after_steps: int | None = None
    """End early, with a checkpoint, after so many steps of the whole run; the schedule stays that of all epochs."""
    walltime_minutes: float | None = None
    """Save and end with status 138 after so long, as at SIGUSR1, where no scheduler gives that warning."""
    stop_after_bad_steps: int = 10
    """End where so many steps in a row were skipped because loss or gradients were not finite."""
    ledger: bool = False
    """Note each step's sample ids, by rank, in RUN/ledger."""
    histograms: bool = False
    """Write the weights' histograms to TensorBoard at each evaluation."""
    profile_steps: int = 0
    """Trace so many steps with torch.profiler, after ten of warm-up, into RUN/profile."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "samples",
            "global_batch",
            "micro_batch",
            "log_every",
            "evaluate_every_epochs",
            "stop_after_steps",
            "stop_after_bad_steps",
        ):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}: at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: from 0 to 2^32 - 1, half of the key of every draw")
        if self.walltime_minutes is not None and not self.walltime_minutes > 0:
            raise ValueError(f"walltime_minutes is {self.walltime_minutes}: above 0, or None")
        if self.profile_steps < 0:
            raise ValueError(f"profile_steps is {self.profile_steps}: at least 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}: from 0 to below 1")
        self.loss.check_smoothing(self.label_smoothing)


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
