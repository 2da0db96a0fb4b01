"""A checkpoint as those use it who did not train it: what it says of itself, its model, its classes."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from pipeline.checkpoint import CONFIG_NAME, LABEL_MAP_NAME, latest_generation, verify_generation
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.models import ModelConfig, create_model
from pipeline.noise.config import NoiseConfig
from pipeline.sections import from_json


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself, enough to build its model again."""

    folder: Path
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig
    noise: NoiseConfig
    classes: tuple[str, ...]
    seed: int
    step: int


def open_checkpoint(source: Path) -> Checkpoint:
    """A run folder's latest checkpoint, or the checkpoint itself. Errors name the folder and the mend."""
    if not source.is_dir():
        raise FileNotFoundError(f"no checkpoint at {source}: name a run folder, or a checkpoint in it")
    folder = latest_generation(source) if (source / "checkpoints").is_dir() else source
    if folder is None:
        raise FileNotFoundError(f"{source} holds no finished checkpoint: train there first, or name another")
    verify_generation(folder, lambda name: name == CONFIG_NAME)  # a run folder has a config.json too, but no sums
    path = folder / CONFIG_NAME
    body = json.loads(path.read_text())
    # The checkpoint's own copy: the file that training read may be gone, or changed.
    own_map = folder / LABEL_MAP_NAME if (folder / LABEL_MAP_NAME).is_file() else None
    return Checkpoint(
        folder,
        model=from_json(ModelConfig, body["model"], f"{path}: model"),
        data=replace(from_json(DataConfig, body["data"], f"{path}: data"), label_map=own_map),
        augment=from_json(AugmentConfig, body["augment"], f"{path}: augment"),
        noise=from_json(NoiseConfig, body["noise"], f"{path}: noise"),
        classes=tuple(body["classes"]),
        seed=body["seed"],
        step=body["step"],
    )


def run_folder(checkpoint: Checkpoint) -> Path:
    """The folder of the run that it is of; its own where it stands alone."""
    return next((p.parent for p in checkpoint.folder.parents if p.name == "checkpoints"), checkpoint.folder)


def load_model(checkpoint: Checkpoint, ema: bool = False) -> nn.Module:
    """The checkpoint's timm model with its weights or their average, on the CPU, its sums checked."""
    config = replace(checkpoint.model.without_start(), init_from=checkpoint.folder, init_ema=ema)
    return create_model(config, len(checkpoint.classes), checkpoint.data.image_size)


def require_classes(data: str, classes: tuple[str, ...], checkpoint: Checkpoint) -> None:
    """Errors: ValueError where the classes of `data` are not the checkpoint's, naming the first that differ."""
    if len(classes) < 2:
        found = f"one class, {classes[0]!r}" if classes else "no class"
        raise ValueError(
            f"{data} has {found}: pictures without labels have no accuracy; shard a folder that "
            "holds one folder for each of the checkpoint's classes"
        )
    if difference := class_difference(classes, checkpoint.classes):
        raise ValueError(
            f"{data} has not the classes that {checkpoint.folder} was trained on: {difference}; use the data it was "
            "trained for, or shards of folders with the same names"
        )


def class_difference(own: tuple[str, ...], other: tuple[str, ...]) -> str:
    """How many there are of each, and the first that differ; empty where they are the same."""
    for number, (here, there) in enumerate(itertools.zip_longest(own, other)):
        if here != there:
            first, second = ("none" if name is None else repr(name) for name in (here, there))
            return (
                f"{len(own)} here, {len(other)} there, the first that differ are number {number}, {first} and {second}"
            )
    return ""
