"""Small splits of real JPEGs, with their shards and .beton, for the tests of readers and loaders."""

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.beton import BetonOptions, write_beton
from data_prep.distribute import ShardOptions, shard
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig, open_split
from pipeline.data.reader import PictureReader

CLASSES = ("ant", "bee", "cat")
SIDE = 64
# Boxes of exactly 32 x 32 at keyed places, flipped or not, and a middle of 32 x 32: nothing is resized.
EXACT = AugmentConfig(scale=(0.25, 0.25), ratio=(1.0, 1.0), eval_crop_share=0.5)
STRAY_BYTES = b"\x12\x34\x56"
STRAY = 5  # this sample of the source has stray bytes in its JPEG, of which decoders warn


def jpeg(seed: int, width: int = SIDE, height: int = SIDE, **options) -> bytes:
    coarse = np.random.RandomState(seed).randint(0, 256, (8, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(
        buffer, **({"format": "JPEG", "quality": 90} | options)
    )
    return buffer.getvalue()


def make(root: Path, sizes: list[tuple[int, int]], mode: str, **options) -> Path:
    """Shards and a .beton of 3 classes; returns the manifest's path."""
    for label, name in enumerate(CLASSES):
        (root / "source" / name).mkdir(parents=True)
        for i in range(8):
            seed = 8 * label + i
            data = jpeg(seed, *sizes[seed % len(sizes)])
            if seed == STRAY:
                data = data.replace(b"\xff\xda", STRAY_BYTES + b"\xff\xda", 1)  # before the scan
            (root / "source" / name / f"{i}.jpg").write_bytes(data)
    shard(ShardOptions(**({"source": root / "source", "out": root, "samples_per_shard": 7, "processes": 1} | options)))
    write_beton(BetonOptions(manifest=root / "train.manifest.json", mode=mode, processes=1))
    shutil.rmtree(root / "source")
    return root / "train.manifest.json"


def tars(manifest: Path, augment: AugmentConfig = EXACT, size: int = 32, seed: int = 0, **options) -> PictureReader:
    return open_split(str(manifest), DataConfig(image_size=size, workers=2, **options), augment, seed)


def beton(manifest: Path, augment: AugmentConfig = EXACT, size: int = 32, seed: int = 0, **options) -> PictureReader:
    return tars(manifest, augment, size, seed, format="ffcv", **options)
