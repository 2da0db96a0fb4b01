"""Which of a checkpoint's classes are which of ImageNet's, and of the subsets that -A and -R have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

WNID = re.compile(r"n[0-9]{8}")
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class WordNetClasses:
    """A checkpoint's classes in the order of their WordNet ids, which class indices (V2, ReaL) follow."""

    names: tuple[str, ...]
    columns: np.ndarray  # int64 (n,): the logit of each
    is_imagenet: bool  # the 1,000 of ILSVRC2012, to which alone the published sets and figures belong

    def columns_of(self, names: tuple[str, ...]) -> np.ndarray:
        """int64 (len(names),)."""
        place = {name: i for i, name in enumerate(self.names)}
        return self.columns[[place[name] for name in names]]


def wordnet_classes(classes: tuple[str, ...], checkpoint: str) -> WordNetClasses:
    """classes: of the logits, in their order. Errors: ValueError where they are no WordNet ids."""
    others = [name for name in classes if not WNID.fullmatch(name)]
    if others:
        raise ValueError(
            f"{checkpoint} has classes that are no WordNet ids ({', '.join(others[:3])}), by which ImageNet's variants "
            "name theirs: evaluate a checkpoint that was trained on ImageNet's own folders (n01440764, ...)"
        )
    names = tuple(sorted(classes))
    columns = np.array([classes.index(name) for name in names], np.int64)
    return WordNetClasses(names, columns, names == synsets("imagenet"))


@cache
def synsets(name: str) -> tuple[str, ...]:
    """WordNet ids, sorted, of `imagenet` (1,000), `imagenet_a` or `imagenet_r` (200 each), which timm carries."""
    listed = (files("timm.data") / "_info" / f"{name}_synsets.txt").read_text().split()
    return tuple(sorted(listed))
