"""The command that gives a configuration again: the recipe nearest to it, and every option that differs."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

from pipeline.config import TrainConfig
from pipeline.evaluate import EvaluateConfig
from pipeline.recipes import all_recipes

_FOLD = 72  # characters after which a shell line breaks before the next option


def shown_path(path: Path) -> str:
    """Relative to the working folder: it works in a command, and names no folder of this machine above that one."""
    return os.path.relpath(path) if path.is_absolute() else str(path)


def train_command(config: TrainConfig, world_size: int) -> str:
    """For a shell, the run folder always named; after a comment where something else started the ranks."""
    options = []
    for name, recipe in all_recipes().items():
        found = _differing(config, dataclasses.replace(recipe.config, run=Path()))
        if found is not None:
            options.append([name, *found])
    if not options:
        return f"# no recipe leads to {shown_path(config.run)}: its config.json holds every option"
    command = _folded(["python", "-m", "pipeline", "train", *min(options, key=len)])
    if world_size == config.parallel.processes:
        return command
    return f"# as {world_size} ranks, started by torchrun or a job of `python -m jobs`\n{command}"


def evaluate_command(config: EvaluateConfig) -> str:
    """For a shell."""
    found = _differing(config, EvaluateConfig(checkpoint=Path(), data=""))
    assert found is not None, "evaluate's defaults hold no dictionary"
    return _folded(["python", "-m", "pipeline", "evaluate", *found])


def _folded(words: list[str]) -> str:
    """Joined for a shell, over several lines that break before an option."""
    lines = [""]
    for word in words:
        if word.startswith("--") and len(lines[-1]) > _FOLD:
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {shlex.quote(word)}" if lines[-1] else shlex.quote(word)
    return " \\\n".join(lines)


def _differing(section: Any, base: Any, prefix: str = "--") -> list[str] | None:
    """tyro's options that turn `base` into `section`; None where options cannot do it."""
    found: list[str] = []
    for field in dataclasses.fields(section):
        value, default = getattr(section, field.name), getattr(base, field.name)
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            part = _differing(value, default, f"{flag}.")
        else:
            part = [] if value == default else _option(flag, value, default)
        if part is None:
            return None
        found += part
    return found


def _option(flag: str, value: Any, default: Any) -> list[str] | None:
    if isinstance(value, bool):
        head, _, name = flag[2:].rpartition(".")
        return [flag if value else f"--{head}{'.' if head else ''}no-{name}"]
    if isinstance(value, dict):
        return _dictionary(flag, value, default)
    if isinstance(value, tuple):
        return [flag, *(_text(v) for v in value)]
    return [flag, _text(value)]


def _dictionary(flag: str, value: dict[str, Any], default: dict[str, Any]) -> list[str] | None:
    """tyro knows a recipe's dictionary by its keys, and takes free pairs only where the recipe's is empty."""
    if not default:
        return [flag, *(_text(v) for pair in value.items() for v in pair)]
    if value.keys() != default.keys():
        return None
    changed = {key: v for key, v in value.items() if v != default[key]}
    return [word for key, v in changed.items() for word in (f"{flag}.{key.replace('_', '-')}", _text(v))]


def _text(value: Any) -> str:
    return shown_path(value) if isinstance(value, Path) else str(value)
