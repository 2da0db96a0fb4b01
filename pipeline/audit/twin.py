"""The clean twin: what must be as in the audited checkpoint, and what else is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pipeline.checkpoint import CONFIG_NAME
from pipeline.trained import Checkpoint, class_difference

# Of TrainConfig: what training did. The rest says where, how fast, and what was noted of it.
_TRAINING = ("epochs", "samples", "global_batch", "seed", "label_smoothing", "loss", "model", "augment", "optim")
_DATA = ("train", "label_map", "on_bad_sample")
_SHOWN = 6


def check_twin(audited: Checkpoint, twin: Checkpoint) -> None:
    """Errors: ValueError where the twin is not clean, the audited one is, or they are no two of one model."""
    if twin.noise.kind != "none":
        raise ValueError(
            f"--twin {twin.folder} has a noise of its own, {twin.noise.describe()}: name one that was trained without "
            "any (the noisy checkpoint stands first, its clean twin with --twin)"
        )
    if not audited.noise.active(training=True):
        raise ValueError(
            f"{audited.folder} was trained without noise: name the noisy checkpoint first, its clean twin with --twin"
        )
    for what, own, other in (
        ("model", audited.model.name, twin.model.name),
        ("model.options", audited.model.options, twin.model.options),
        ("image_size", audited.data.image_size, twin.data.image_size),
    ):
        if own != other:
            raise ValueError(
                f"--twin {twin.folder} is no twin: its {what} is {other}, that of {audited.folder} is {own}; name a "
                "checkpoint that differs in the noise alone"
            )
    if difference := class_difference(audited.classes, twin.classes):
        raise ValueError(f"--twin {twin.folder} is no twin: it knows other classes, {difference}")


def differences(audited: Checkpoint, twin: Checkpoint) -> str:
    """What else than the noise their trainings differ in, in words; empty where nothing does."""
    here, there = (dict(_training(checkpoint)) for checkpoint in (audited, twin))
    found = [
        f"{name} {here.get(name)} here, {there.get(name)} there"
        for name in {**here, **there}
        if here.get(name) != there.get(name)
    ]
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"beside the noise they differ in {', '.join(found[:_SHOWN])}{more}" if found else ""


def _training(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    body = json.loads((checkpoint.folder / CONFIG_NAME).read_text())
    yield "step", checkpoint.step
    for name in _TRAINING:
        yield from _leaves(name, body.get(name))
    for name in _DATA:
        yield f"data.{name}", body["data"].get(name)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}", part)
    else:
        yield name, value
