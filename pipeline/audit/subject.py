"""What is audited: a checkpoint of this project, or the published weights by the official run's settings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from pipeline.audit.cut import official_place
from pipeline.checkpoint import EMA_NAME, WEIGHTS_NAME, recorded_sha256
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.models import ModelConfig, create_model
from pipeline.noise.config import LINEAR_KINDS, NoiseConfig
from pipeline.published import HEADLINES, Headline, Resolution
from pipeline.trained import Checkpoint, class_difference, load_model, open_checkpoint, require_classes, run_folder
from pipeline.variants.classes import synsets
from pipeline.weights import timm_settings

PAPER_K = 10
LinearKind = Literal["optimal_q", "circular_shift"]


@dataclass(frozen=True)
class Subject:
    """A model and how its pictures are read."""

    source: Path
    """Its checkpoint's folder, or the file of its weights."""
    home: Path
    """The folder that its results go into, by default."""
    model: nn.Module
    model_name: str
    """timm's."""
    data: DataConfig
    augment: AugmentConfig
    seed: int
    own_noise: NoiseConfig
    weights_sha256: str
    checkpoint: Checkpoint | None
    """None of published weights."""
    published: Headline | None = None

    def check_classes(self, data: str, classes: tuple[str, ...]) -> None:
        """Errors: ValueError where the classes of `data` are not the model's."""
        if self.checkpoint is not None:
            require_classes(data, classes, self.checkpoint)
        elif difference := class_difference(classes, synsets("imagenet")):
            raise ValueError(
                f"{data} has not ImageNet's classes, which the published weights answer: {difference}; name shards of "
                "ImageNet's validation pictures in folders called by WordNet id (n01440764, ...)"
            )


def subject_of(source: Path, ema: bool) -> Subject:
    """A run folder's latest checkpoint, or a checkpoint. Errors: as open_checkpoint."""
    checkpoint = open_checkpoint(source)
    return Subject(
        source=checkpoint.folder,
        home=run_folder(checkpoint),
        model=load_model(checkpoint, ema),
        model_name=checkpoint.model.name,
        data=checkpoint.data,
        augment=checkpoint.augment.for_evaluation(),
        seed=checkpoint.seed,
        own_noise=checkpoint.noise,
        weights_sha256=str(recorded_sha256(checkpoint.folder, EMA_NAME if ema else WEIGHTS_NAME)),
        checkpoint=checkpoint,
    )


def published_subject(weights: Path, resolution: Resolution) -> Subject:
    """timm's weights in a local file, with the official run's pictures.

    They are squashed by torchvision's bilinear filter, and normalised by ImageNet's mean and deviation, whatever the
    weights were trained with.

    Errors: FileNotFoundError, ValueError naming the file where it is not there or holds another model.
    """
    published = HEADLINES[resolution]
    if not weights.is_file():
        raise FileNotFoundError(
            f"{weights} is no file: --paper takes timm's {published.model} as a local .safetensors, .pth or .npz"
        )
    with open(weights, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    model = create_model(ModelConfig(published.model, init_from=weights), len(synsets("imagenet")), resolution)
    timm_settings(model).update(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    return Subject(
        source=weights,
        home=weights.parent,
        model=model,
        model_name=published.model,
        data=DataConfig(image_size=resolution),
        augment=AugmentConfig(eval_crop="squash", interpolation="bilinear"),
        seed=0,
        own_noise=NoiseConfig(),
        weights_sha256=sha256,
        checkpoint=None,
        published=published,
    )


def noises_of(
    subject: Subject, kinds: Sequence[LinearKind], strength: float | None, sites: tuple[str, ...], all_tokens: bool
) -> list[NoiseConfig]:
    """Each kind at each site; without sites at that of the checkpoint's own mixing noise, else the official place.

    Errors: ValueError for a family that the paper has no place for.
    """
    own = subject.own_noise
    start: dict[str, Any] = {"spare_prefix_tokens": not all_tokens}
    if not sites and own.kind in LINEAR_KINDS:
        # A noise that mixes nothing was trained at a place of its own, which says nothing of where mixing would act.
        sites = (own.site,)
        start = {"pick": own.pick, "spare_prefix_tokens": own.spare_prefix_tokens and not all_tokens}
    places = sites or (official_place(subject.model),)
    noise = NoiseConfig("optimal_q", during="eval", **start)
    return [
        replace(noise, kind=kind, strength=strength if kind == "circular_shift" else None, site=place)
        for place in places
        for kind in kinds
    ]
