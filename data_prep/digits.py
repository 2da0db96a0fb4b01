"""The 1,797 real handwritten digits of scikit-learn as an ImageFolder of JPEG files: real pictures, no download."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

VAL_PER_CLASS = 40
SIDE = 32  # pixels, from 8
QUALITY = 95
NUM_DIGITS = 1797


@dataclass(frozen=True)
class DigitsOptions:
    """Write scikit-learn's handwritten digits, enlarged to 32x32, as an ImageFolder with splits train and val."""

    out: Path
    """Folder to write; it must not hold anything else."""


def write_digits(options: DigitsOptions) -> int:
    """Writes `<out>/{train,val}/<digit>/<number>.jpg`, the number being the place in scikit-learn's order.

    Val holds 40 of each class, spread evenly through it, so that all writers occur in both splits. The folder appears
    whole or not at all. Returns the number of pictures written: 0 where they are all there already.
    Errors: ValueError where `out` holds anything else.
    """
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        if _is_complete(options.out):
            return 0
        raise ValueError(f"--out {options.out} exists and does not hold the digits: remove it, or name another")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_name(f".{options.out.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        count = _write_pictures(temporary)
        os.sync()  # some 1,800 small files: one sync, not one each
        os.replace(temporary, options.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count


def _write_pictures(folder: Path) -> int:
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    for number, split in enumerate(choose_splits(digits.target)):
        # The scan's 17 levels (0 to 16) over the whole range of a byte.
        pixels = np.round(digits.images[number] * (255 / 16)).astype(np.uint8)
        path = folder / split / str(digits.target[number]) / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        # In colour, as most pictures are: `shard` would mend, and list, each grey one.
        picture.convert("RGB").save(path, quality=QUALITY)
    return len(digits.target)


def choose_splits(labels: np.ndarray) -> list[str]:
    """'train' or 'val' for each sample. labels: int (n,)."""
    splits = ["train"] * len(labels)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        for place in ((np.arange(VAL_PER_CLASS) + 0.5) * len(members) / VAL_PER_CLASS).astype(int):
            splits[members[place]] = "val"
    return splits


def _is_complete(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    pictures = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    numbers = {path.stem for path in pictures if path.parts[0] in ("train", "val") and path.suffix == ".jpg"}
    return len(pictures) == NUM_DIGITS and numbers == {f"{number:04d}" for number in range(NUM_DIGITS)}
