"""ImageFolder's order of a split: class, then file name. Which of a class's pictures meet in a group hangs on it.

Shards keep their source's order where they were written with --keep-order; else `shard` has shuffled them, and the
order of the file names is found again by the names in the tars, and proved by the manifest's digest of its source.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import NamedTuple

import numpy as np

from data_prep.manifest import Manifest
from pipeline.data.order import class_order
from pipeline.data.reader import PictureReader
from pipeline.data.shards import TarSource

_AS_FOLDERS = ("image-folder", "train-archive", "val-archive")  # sources that are listed as an ImageFolder is
_SUFFIXES = (".JPEG", ".jpg", ".jpeg", ".png", ".JPG")


class ClassOrder(NamedTuple):
    ids: np.ndarray
    """Sample ids, int64 (n,), class after class."""
    words: str
    """What the order within a class is."""


def class_ordered(where: str, manifest: Manifest, reader: PictureReader, any_order: bool) -> ClassOrder:
    """The split, class after class. where: what messages call it. any_order: sample ids will do within a class.

    Errors: ValueError where the order within a class is not known to be that of the file names, and must be.
    """
    labels = reader.labels_of(np.arange(len(reader)))
    why = f"a source of kind {manifest.source.get('kind')!r} has an order of its own"
    if manifest.source.get("kind") in _AS_FOLDERS:
        if manifest.options.get("keep_order"):
            return ClassOrder(class_order(labels), "by file name, as the shards have it")
        if (by_name := _by_name(manifest, reader)) is not None:
            return ClassOrder(by_name[class_order(labels[by_name])], "by file name, as the tars' members are called")
        why = "its shards were shuffled, and its file names cannot be told from them"
    if any_order:
        return ClassOrder(class_order(labels), f"by sample id: {why}")
    raise ValueError(
        f"{where}: {why}, so ImageFolder's order within a class is not known: write the shards from class folders with "
        "`python -m data_prep shard --keep-order`, or take any order within a class with --any-order"
    )


def _by_name(manifest: Manifest, reader: PictureReader) -> np.ndarray | None:
    """Sample ids, int64 (n,), in the order of the source. None where it cannot be proved."""
    if not isinstance(reader.source, TarSource):
        return None
    keys = [name.partition(".")[0] for name in reader.source.member_names()]
    labels = reader.source.index.labels().tolist()  # before any label map
    number = {name: label for label, name in enumerate(manifest.classes)}
    skipped = [(number.get(note.path.split("/")[0], -1), note.path, -1) for note in manifest.skipped]
    for suffix in _SUFFIXES:
        for with_class in (False, True):  # whether the key has the class's name in front, which the file has not
            found = [
                (label, _path(key, manifest.classes[label], suffix, with_class), sample)
                for sample, (key, label) in enumerate(zip(keys, labels, strict=True))
            ]
            listing = sorted(found + skipped, key=lambda entry: (entry[0], *os.path.split(entry[1])))
            digest = hashlib.sha256("".join(f"{path}\0{label}\n" for label, path, _ in listing).encode()).hexdigest()
            if digest == manifest.source.get("listing_sha256"):
                return np.array([sample for *_, sample in listing if sample >= 0], np.int64)
    return None


def _path(key: str, name: str, suffix: str, with_class: bool) -> str:
    stem = key.removeprefix(re.sub(r"[^A-Za-z0-9_-]", "_", name) + "_") if with_class else key
    return f"{name}/{stem}{suffix}"
