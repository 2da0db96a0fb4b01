"""Parts of a model that are not trained: named as timm names them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.weights import classifier_names

ALL_BUT_HEAD = "all_but_head"


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Keeps the named modules and parameters, and all within them, out of training.

    patterns: names such as `patch_embed`, `blocks.0`, `pos_embed`; `*` stands for one part of a name (`blocks.*.mlp`);
    `all_but_head` leaves the classifier alone. Errors: ValueError for one that fits nothing, with the nearest.
    """
    parameters = dict(model.named_parameters())
    names = {name for name, _ in model.named_modules() if name} | parameters.keys()
    for pattern in patterns:
        for name in _all_but(model, parameters) if pattern == ALL_BUT_HEAD else _matching(pattern, names):
            for key, parameter in parameters.items():
                if key == name or key.startswith(f"{name}."):
                    parameter.requires_grad_(False)


def hold_frozen_norms(model: nn.Module) -> None:
    """After model.train(): frozen BatchNorms go on with the statistics that they have."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def _all_but(model: nn.Module, parameters: dict[str, nn.Parameter]) -> list[str]:
    heads = tuple(f"{name}." for name in classifier_names(model))
    return [key for key in parameters if not key.startswith(heads)]


def _matching(pattern: str, names: set[str]) -> list[str]:
    parts = pattern.split(".")
    found = [name for name in names if _fits(name.split("."), parts)]
    if not found:
        near = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.0)
        raise ValueError(
            f"model.freeze {pattern!r} is no part of the model; nearest: {', '.join(near)}; or {ALL_BUT_HEAD}"
        )
    return found


def _fits(parts: list[str], wanted: list[str]) -> bool:
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
