"""CIFAR-10 (or any small pictures of one size) in memory: read from a folder or an archive, cropped on the device.

Layout: train/<class>/<name> and test/<class>/<name>, in an archive at any depth. A sample's id is its place in the
order of (class, name), as in torchvision's ImageFolder. Reading the archive of 60,000 pictures takes 4 s and decoding
them 9 s on one core, so nothing is cached.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.samples import VARIABLE
from pipeline.noise.config import IMAGE_SITE
from pipeline.noise.reference import Purpose, random_words, stream_of

ARCHIVE = "cifar10-jpeg.tar.xz"
SPLITS = ("train", "test")
_SUFFIXES = (".jpg", ".jpeg", ".png")
_MOST_PIXELS = 256 * 256  # before any is decoded: 60,000 of them would fill 12 GB
PADDING = 4

Found = Mapping[str, Mapping[str, Mapping[str, Path | bytes]]]  # split -> class -> file -> where it is, or its bytes


class Split(NamedTuple):
    images: np.ndarray  # uint8 (N, H, W, 3)
    labels: np.ndarray  # int64 (N,)


class Pictures(NamedTuple):
    train: Split
    test: Split
    classes: tuple[str, ...]
    text: str
    """What they are, for the result."""

    @property
    def side(self) -> int:
        return self.train.images.shape[1]

    def sha256(self) -> str:
        digest = hashlib.sha256(repr(self.classes).encode())
        for array in (*self.train, *self.test):
            digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).data)
        return digest.hexdigest()


def read_pictures(source: Path | None, train_images: int | None, test_images: int | None) -> Pictures:
    """source: a folder or an archive; None: the archive of the folder that NOISYNN_SAMPLES names.

    train_images, test_images: so many, the first of each class; None: all. Errors: ValueError naming the file and the
    mend.
    """
    source = _archive() if source is None else source
    found = _in_folder(source) if source.is_dir() else _in_archive(source)
    classes = _classes(found, source)
    splits = []
    for split, limit in zip(SPLITS, (train_images, test_images), strict=True):
        chosen = _chosen(found[split], classes, limit, split)
        splits.append(_decoded(chosen, classes, source))
    train, test = splits
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(f"{source}: train/ has pictures of {_size(train.images)}, test/ of {_size(test.images)}")
    return Pictures(train, test, classes, f"{source.name}: {len(train.labels)} for training, {len(test.labels)} tested")


def _archive() -> Path:
    path = Path(os.environ.get(VARIABLE) or "no-folder") / ARCHIVE
    if not path.is_file():
        raise ValueError(
            f"no pictures to train on: give --data FOLDER_OR_ARCHIVE with train/<class>/*.jpg and test/<class>/*.jpg, "
            f"or set {VARIABLE} to a folder with {ARCHIVE}"
        )
    return path


def _in_folder(folder: Path) -> Found:
    found: dict[str, dict[str, dict[str, Path | bytes]]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for of_class in (path for path in sorted((folder / split).glob("*")) if path.is_dir()):
            files = (path for path in of_class.iterdir() if path.suffix.lower() in _SUFFIXES)
            found[split][of_class.name] = {path.name: path for path in files}
    return found


def _in_archive(path: Path) -> Found:
    """Members are read, never unpacked."""
    found: dict[str, dict[str, dict[str, Path | bytes]]] = {split: {} for split in SPLITS}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                *_, split, of_class, name = ("", "", *PurePosixPath(member.name).parts)
                if member.isdir() and of_class in SPLITS:
                    found[of_class].setdefault(name, {})
                elif member.isfile() and split in SPLITS and PurePosixPath(name).suffix.lower() in _SUFFIXES:
                    file = tar.extractfile(member)
                    assert file is not None
                    found[split].setdefault(of_class, {})[name] = file.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"--data {path} cannot be read: {error}; name a folder, or fetch the archive again") from error
    return found


def _classes(found: Found, source: Path) -> tuple[str, ...]:
    train, test = (set(found[split]) for split in SPLITS)
    if not train or not test:
        missing = "train" if not train else "test"
        raise ValueError(f"{source} has no {missing}/<class>/*.jpg: lay it out as train/<class>/ and test/<class>/")
    for split, other, absent in (("test", "train", train - test), ("train", "test", test - train)):
        if absent:
            raise ValueError(
                f"{source}: class {min(absent)!r} of {other}/ has no folder in {split}/: add it, or leave it out"
            )
    for split in SPLITS:
        for name, files in found[split].items():
            if not files:
                raise ValueError(f"{source}: {split}/{name} holds no picture: fill it, or leave the class out")
    if len(train) < 2:
        raise ValueError(f"{source} has the one class {min(train)!r}: there is nothing to tell apart")
    return tuple(sorted(train))


def _chosen(
    of_split: Mapping[str, Mapping[str, Path | bytes]], classes: Sequence[str], limit: int | None, split: str
) -> list[tuple[int, str, Path | bytes]]:
    """(label, name, where) in the order of sample ids."""
    option = f"--{split}-images {limit}"
    if limit is not None and (limit < 1 or limit % len(classes)):
        raise ValueError(f"{option}: give a multiple of the {len(classes)} classes, so that each has as many")
    chosen: list[tuple[int, str, Path | bytes]] = []
    for label, of_class in enumerate(classes):
        files = sorted(of_split[of_class].items())
        if limit is not None and len(files) < limit // len(classes):
            raise ValueError(f"{option}: {split}/{of_class} has {len(files)} pictures; lower it")
        end = None if limit is None else limit // len(classes)
        chosen += [(label, f"{split}/{of_class}/{name}", where) for name, where in files[:end]]
    return chosen


def _decoded(chosen: Sequence[tuple[int, str, Path | bytes]], classes: Sequence[str], source: Path) -> Split:
    images: np.ndarray | None = None
    for index, (_, name, where) in enumerate(chosen):
        picture = _picture(where, f"{source}: {name}")
        if images is None:
            images = np.empty((len(chosen), *picture.shape), dtype=np.uint8)
        if picture.shape != images.shape[1:]:
            raise ValueError(
                f"{source}: {name} is {_size(picture)}, others are {_size(images[0])}: make them of one size"
            )
        images[index] = picture
    assert images is not None, "a class has at least one picture"
    return Split(images, np.array([label for label, *_ in chosen], dtype=np.int64))


def _picture(where: Path | bytes, name: str) -> np.ndarray:
    """uint8 (S, S, 3)."""
    try:
        with Image.open(io.BytesIO(where) if isinstance(where, bytes) else where) as image:
            width, height = image.size
            if width != height or width * height > _MOST_PIXELS:
                raise ValueError(f"{name} is {width} x {height}: give square pictures of at most 256 pixels")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow raises either for what it cannot read
        raise ValueError(f"{name} cannot be decoded: {error}; replace it, or leave it out") from error


def _size(pictures: np.ndarray) -> str:
    return f"{pictures.shape[-2]} x {pictures.shape[-3]}"


# ---- on the device ----


class Crops(NamedTuple):
    """What an epoch does with each sample: the corner of its crop in the padded picture, and whether it is mirrored."""

    top: Tensor  # int64 (N,), 0 to 2 * PADDING
    left: Tensor
    flip: Tensor  # bool (N,)


def draw_crops(samples: int, seed: int, epoch: int, device: torch.device) -> Crops:
    """Functions of (seed, epoch, sample id), from the streams that pipeline.data.augment draws crop and flip from."""
    ids, of_epoch = torch.arange(samples, device=device), torch.tensor(epoch, device=device)
    corner = random_words(2, ids, seed, of_epoch, stream_of(IMAGE_SITE, Purpose.CROP))
    top, left = (corner * (2 * PADDING + 1) >> 32).unbind(1)
    flip = random_words(1, ids, seed, of_epoch, stream_of(IMAGE_SITE, Purpose.FLIP))[:, 0] < 1 << 31
    return Crops(top, left, flip)


def padded(images: Tensor) -> Tensor:
    """uint8 (N, S, S, 3) -> (N, S + 2 * PADDING, S + 2 * PADDING, 3), black around the picture."""
    return torch.nn.functional.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))


def cropped(padded_images: Tensor, sample_ids: Tensor, crops: Crops) -> Tensor:
    """The samples' pictures of this epoch, uint8 (B, S, S, 3)."""
    side = padded_images.shape[1] - 2 * PADDING
    steps = torch.arange(side, device=padded_images.device)
    rows = crops.top[sample_ids, None] + steps
    across = torch.where(crops.flip[sample_ids, None], steps.flip(0), steps)
    columns = crops.left[sample_ids, None] + across
    return padded_images[sample_ids[:, None, None], rows[:, :, None], columns[:, None, :]]
