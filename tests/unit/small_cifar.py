"""A small twin of cifar10-jpeg.tar.xz: four classes of JPEGs that differ in brightness."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat", "dog")
SIDE, TRAIN, TEST = 16, 12, 10  # pictures of each class


def jpeg(label: int, number: int, width: int = SIDE, height: int = SIDE) -> bytes:
    """Noise around the class's level."""
    draw = np.random.RandomState(1000 * label + number)
    levels = np.clip(60 * label + draw.randint(0, 60, (height, width, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_folder(root: Path) -> Path:
    for split, count, first in (("train", TRAIN, 0), ("test", TEST, 500)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i:04d}.jpg").write_bytes(jpeg(label, first + i))
    return root


def pack(folder: Path) -> Path:
    """The archive beside the folder; its members are not in the order of the classes."""
    path = folder.with_name(f"{folder.name}.tar.xz")
    with tarfile.open(path, "w:xz") as tar:
        for file in sorted(folder.rglob("*"), key=lambda file: file.name):
            tar.add(file, str(file.relative_to(folder)), recursive=False)
    return path
