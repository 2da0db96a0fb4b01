"""A small ImageFolder with odd pictures, and what a test of whole shards asks of its output."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.distribute import ShardOptions, shard
from data_prep.images import decode_rgb
from data_prep.sources.image_folder import ImageFolder
from data_prep.verify import VerifyOptions, verify

CLASSES = ("ant", "bee", "cat")
PER_CLASS = 8


def picture(seed: int, height: int = 32, width: int = 40) -> Image.Image:
    """A smooth picture of its own for each seed."""
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def shard_source(source: Path, out: Path, **options):
    return shard(ShardOptions(source=source, out=out, **({"samples_per_shard": 7, "processes": 1} | options)))


def check(folder: Path, **options) -> list[str]:
    return verify(VerifyOptions(manifest=folder / "train.manifest.json", processes=1, **options))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def originals(source: Path) -> dict[str, tuple[np.ndarray, int]]:
    """key -> (pixels as Pillow sees the source, label)."""
    listing = ImageFolder(source).scan()
    samples = [listing.sample(i) for i in range(len(listing))]
    return {sample.key: (decode_rgb((source / sample.path).read_bytes()), sample.label) for sample in samples}


def assert_same_picture(key: str, pixels: np.ndarray, expected: np.ndarray) -> None:
    if key.endswith("_1"):  # the PNG was repaired, so encoded once; a grey JPEG is repaired without loss
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected).mean() < 2
    else:
        np.testing.assert_array_equal(pixels, expected)
