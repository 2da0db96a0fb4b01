"""One Python file an experiment: source, command, hardware, hours, expected top-1, and its configuration.

Listing the names imports none of them, so that job launchers need no torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import Recipe


def recipe_names() -> tuple[str, ...]:
    """Modules whose names begin with _ are what recipes share."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def load_recipe(name: str) -> Recipe:
    return importlib.import_module(f"{__name__}.{name}").RECIPE


def all_recipes() -> dict[str, Recipe]:
    return {name: load_recipe(name) for name in recipe_names()}
