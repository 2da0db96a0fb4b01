"""Twins of what ImageNet is handed out as, made from an ImageFolder: official archives, devkit, Parquet files."""

import io
import json
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.io import savemat

from data_prep.sources import Source

# The real meta.mat's.
META_FIELDS = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")


def make_folder(root: Path, classes: Iterable[str], per_class: int, name: str = "{wnid}_{number}.JPEG") -> Path:
    """An ImageFolder of bytes that are no pictures, for sources do not look into them; each file has its own size."""
    draw = random.Random(0)
    for wnid in classes:
        (root / wnid).mkdir(parents=True)
        for number in draw.sample(range(1, 20_000), per_class):
            (root / wnid / name.format(wnid=wnid, number=number)).write_bytes(draw.randbytes(draw.randrange(1, 3000)))
    return root


def tar_of(members: Iterable[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of (name, bytes), with its end mark."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def train_tar(root: Path, path: Path) -> Path:
    """ILSVRC2012_img_train.tar: a tar of one tar a class; as in the real one, neither is sorted by name."""
    draw = random.Random(1)
    inner = []
    for folder in sorted(root.iterdir()):
        files = sorted(folder.iterdir())
        draw.shuffle(files)
        inner.append((f"{folder.name}.tar", tar_of((file.name, file.read_bytes()) for file in files)))
    draw.shuffle(inner)
    path.write_bytes(tar_of(inner))
    return path


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def val_twin(root: Path, folder: Path, prefix: str = "") -> tuple[Path, Path, Path]:
    """(ILSVRC2012_img_val.tar, its devkit, the ImageFolder of both), of the pictures of an ImageFolder, mixed."""
    pictures = [(file.parent.name, file.read_bytes()) for file in sorted(root.rglob("*.JPEG"))]
    random.Random(2).shuffle(pictures)
    members = []
    for number, (wnid, data) in enumerate(pictures, 1):
        (folder / "val" / wnid).mkdir(parents=True, exist_ok=True)
        (folder / "val" / wnid / val_name(number)).write_bytes(data)
        members.append((f"{prefix}{val_name(number)}", data))
    archive = folder / "ILSVRC2012_img_val.tar"
    archive.write_bytes(tar_of(members))
    return archive, devkit([wnid for wnid, _ in pictures], folder), folder / "val"


def ids_of(wnids: Iterable[str]) -> dict[str, int]:
    """wnid -> ILSVRC2012_ID: 1 to n, in an order that is not that of the wnids."""
    ordered = sorted(set(wnids))
    random.Random(3).shuffle(ordered)
    if len(ordered) > 1 and ordered == sorted(ordered):
        ordered.reverse()
    return {wnid: number for number, wnid in enumerate(ordered, 1)}


def meta_mat(wnids: Iterable[str]) -> bytes:
    """meta.mat as the real one is laid out: a struct array (n, 1), the leaves first, then the inner nodes."""
    ids = ids_of(wnids)
    rows = [(number, wnid, f"{wnid}, its name", "gloss", 0, [], 0) for wnid, number in ids.items()]
    inner = range(len(ids) + 1, len(ids) + 4)
    rows += [(number, f"n9999999{number % 10}", "inner", "gloss", 2, [1.0, 2.0], 3) for number in inner]
    table = np.empty((len(rows), 1), dtype=[(name, object) for name in META_FIELDS])
    for index, row in enumerate(rows):
        table[index, 0] = row
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": table})
    return buffer.getvalue()


def devkit(truth: list[str], folder: Path) -> Path:
    """ILSVRC2012_devkit_t12.tar.gz, where picture i is of class truth[i - 1]."""
    ids = ids_of(truth)
    lines = "".join(f"{ids[wnid]}\n" for wnid in truth)
    return pack_devkit(folder, meta_mat(truth), lines.encode())


def pack_devkit(folder: Path, meta: bytes, truth: bytes) -> Path:
    path = folder / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (
            ("readme.txt", b"as downloaded"),
            ("data/meta.mat", meta),
            ("data/ILSVRC2012_validation_ground_truth.txt", truth),
        ):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def parquet_files(root: Path, folder: Path, files: int = 3, rows_per_group: int = 4, suffix: bool = True) -> Path:
    """The hub's files, train-0000i-of-0000n.parquet, of an ImageFolder's pictures, mixed; returns their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = sorted(path.name for path in root.iterdir())
    pictures = sorted(root.rglob("*.JPEG"))
    random.Random(4).shuffle(pictures)
    for number in range(files):
        part = pictures[number::files]
        paths = [f"{p.stem}_{p.parent.name}{p.suffix}" if suffix else p.name for p in part]
        write_parquet(
            folder / f"train-{number:05d}-of-{files:05d}.parquet",
            [{"bytes": p.read_bytes(), "path": path} for p, path in zip(part, paths, strict=True)],
            [classes.index(p.parent.name) for p in part],
            names=[f"{name}, its name" for name in classes],
            rows_per_group=rows_per_group,
        )
    return folder


def write_parquet(
    path: Path,
    images: list,
    labels: list,
    names: list[str] | None = None,
    rows_per_group: int = 4,
    image_type: pa.DataType | None = None,
    label_type: pa.DataType | None = None,
) -> Path:
    """One Parquet file; with `names`, as Hugging Face's `datasets` writes it."""
    image = pa.array(images, image_type or pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": image, "label": pa.array(labels, label_type or pa.int64())})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def held(source: Source) -> dict[str, tuple[str, str, bytes]]:
    """key -> (path, class, bytes) of all that a source holds, read in a shuffled order."""
    listing = source.scan()
    samples = [listing.sample(index) for index in range(len(listing))]
    random.Random(5).shuffle(samples)
    pictures = zip(samples, source.read(samples), strict=True)
    return {sample.key: (sample.path, listing.classes[sample.label], data) for sample, data in pictures}
