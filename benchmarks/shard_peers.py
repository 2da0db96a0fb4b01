"""The peers' writers and readers of shards, as their users call them, and what they made."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SAMPLES_PER_SHARD = 1000
COMPARED = 100  # pictures of each writer that are decoded and compared


def write_plainly(contents: list[bytes], images: int, out: Path) -> int:
    """The disk's own rate: bytes that are in memory already, written and fsynced; no format, nothing hashed."""
    for first in range(0, images, SAMPLES_PER_SHARD):
        with open(out / f"{first}.bin", "wb") as file:
            for number in range(first, min(images, first + SAMPLES_PER_SHARD)):
                file.write(contents[number % len(contents)])
            file.flush()
            os.fsync(file.fileno())
    return images


def copy_plainly(paths: list[Path], out: Path) -> int:
    """The same, with the pictures read from their files."""
    for first in range(0, len(paths), SAMPLES_PER_SHARD):
        with open(out / f"{first}.bin", "wb") as file:
            for path in paths[first : first + SAMPLES_PER_SHARD]:
                file.write(path.read_bytes())
            file.flush()
            os.fsync(file.fileno())
    return len(paths)


class WebdatasetJob(NamedTuple):
    pattern: str
    paths: list[Path]
    keys: list[str]
    labels: list[int]


def webdataset_jobs(
    out: Path, paths: list[Path], keys: list[str], labels: list[int], processes: int
) -> list[WebdatasetJob]:
    """A run of pictures for each process, each with shards of its own."""
    size = -(-len(paths) // processes)
    starts = range(0, len(paths), size)
    return [
        WebdatasetJob(str(out / f"{n}-%06d.tar"), paths[s : s + size], keys[s : s + size], labels[s : s + size])
        for n, s in enumerate(starts)
    ]


def write_webdataset(job: WebdatasetJob) -> int:
    """webdataset's ShardWriter, as its documentation shows it."""
    import webdataset

    with webdataset.ShardWriter(job.pattern, maxcount=SAMPLES_PER_SHARD, verbose=0) as sink:
        for path, key, label in zip(job.paths, job.keys, job.labels, strict=True):
            sink.write({"__key__": key, "jpg": path.read_bytes(), "cls": label})
    return len(job.paths)


class _Pictures:
    """An indexed dataset for FFCV's writer: pictures opened with Pillow, as torchvision's ImageFolder gives them."""

    def __init__(self, paths: list[str], labels: list[int]) -> None:
        self.paths, self.labels = paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with open(self.paths[index], "rb") as file:
            return Image.open(file).convert("RGB"), self.labels[index]


def write_ffcv(path: Path, paths: list[str], labels: list[int], longest_side: int, quality: int, workers: int) -> int:
    """FFCV's DatasetWriter in jpg mode."""
    os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField(write_mode="jpg", max_resolution=longest_side, jpeg_quality=quality)
    writer = DatasetWriter(str(path), {"image": image, "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(_Pictures(paths, labels))
    return len(paths)


def beton_pictures(out: Path) -> list[np.ndarray]:
    """The first pictures of train.beton, decoded by Pillow."""
    from ffcv.reader import Reader

    data = (out / "train.beton").read_bytes()
    reader = Reader(str(out / "train.beton"))
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    places = reader.metadata["f0"]["data_ptr"][:COMPARED].tolist()
    return [_decoded(data[place : place + sizes[place]]) for place in places]


def tar_pictures(out: Path) -> list[np.ndarray]:
    """The first pictures of the first tar, decoded by Pillow."""
    found: list[np.ndarray] = []
    with tarfile.open(min(out.glob("*.tar"))) as tar:
        for member in tar:
            if member.name.endswith(".jpg") and len(found) < COMPARED:
                found.append(_decoded(tar.extractfile(member).read()))  # type: ignore[union-attr]
    return found


def _decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write_many_members(path: Path, members: int) -> int:
    """A tar of small samples, two members each, as webdataset lays them out; returns how many members it has."""
    path.parent.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(-(-members // 2)):
            for name, data in ((f"{number:08d}.jpg", buffer.getvalue()), (f"{number:08d}.cls", b"%d" % (number % 10))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return 2 * -(-members // 2)


def walk_with_tarfile(path: Path) -> int:
    """Members that Python's tarfile finds."""
    count = 0
    with tarfile.open(path) as tar:
        for _ in tar:
            count += 1
    return count
