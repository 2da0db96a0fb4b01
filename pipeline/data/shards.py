"""Random access to WebDataset tars through their indexes, every picture checked against its CRC as it is read."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from data_prep.manifest import INDEX_HEADER, INDEX_TRAILER, Manifest, ShardRecord, check_index
from pipeline.data.augment import AugmentConfig, apply_randaugment, apply_training, evaluation_transform, training_crops
from pipeline.data.batch import Batch
from pipeline.data.decode import decode_rgb

_RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("crc32", "<u4")])
_OPEN_FILES = 128  # a process may open 1,024 by default, and ImageNet has more shards than that


class ShardReader:
    """One split's tars. Safe to fork: files are read by offset, and opened where they are first needed."""

    def __init__(self, manifest: Manifest, image_size: int, augment: AugmentConfig, seed: int) -> None:
        self.manifest = manifest
        self.classes = manifest.classes
        self.image_size = image_size
        self.augment = augment
        self.seed = seed
        self._index = np.concatenate([_read_index(manifest, shard) for shard in manifest.shards])
        self._first_id = np.cumsum([0] + [shard.samples for shard in manifest.shards])
        self.labels = self._index["label"].astype(np.int64)
        _check_labels(self.labels, manifest)
        self._files: OrderedDict[int, int] = OrderedDict()

    def batch(self, sample_ids: np.ndarray, epoch: int | None) -> Batch:
        pictures = [decode_rgb(self.read(i), self.where(i)) for i in sample_ids]
        if epoch is None:
            transform = evaluation_transform(self.augment, self.image_size)
            arrays = [np.asarray(transform(picture)).transpose(1, 2, 0) for picture in pictures]
        else:
            crops = training_crops([p.size for p in pictures], sample_ids, self.seed, epoch, self.augment)
            cropped = [
                apply_training(p, crop, self.image_size, self.augment) for p, crop in zip(pictures, crops, strict=True)
            ]
            arrays = [
                np.asarray(apply_randaugment(picture, int(i), self.seed, epoch, self.augment))
                for picture, i in zip(cropped, sample_ids, strict=True)
            ]
        ids = torch.as_tensor(sample_ids, dtype=torch.int64)
        return Batch(torch.from_numpy(np.stack(arrays)), torch.from_numpy(self.labels[sample_ids]), ids)

    def read(self, sample_id: int) -> bytes:
        """The picture's bytes as they stand in the tar.

        Errors: ValueError naming shard and sample where they are not what the index says.
        """
        shard = int(np.searchsorted(self._first_id, sample_id, side="right")) - 1
        entry = self._index[sample_id]
        data = os.pread(self._open(shard), int(entry["size"]), int(entry["offset"]))
        if len(data) != entry["size"] or zlib.crc32(data) != entry["crc32"]:
            raise ValueError(
                f"{self.where(sample_id)}: the bytes are not those that were written (CRC differs); "
                "run `python -m data_prep verify` and write this shard again"
            )
        return data

    def where(self, sample_id: int) -> str:
        shard = int(np.searchsorted(self._first_id, sample_id, side="right")) - 1
        path = self.manifest.folder / self.manifest.shards[shard].name
        return f"sample {sample_id} ({path}, picture {sample_id - self._first_id[shard]})"

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.manifest.folder / self.manifest.shards[shard].name, os.O_RDONLY)
        return self._files[shard]


def _read_index(manifest: Manifest, shard: ShardRecord) -> np.ndarray:
    """The records of a shard whose tar is there. Errors: as index_records."""
    tar = manifest.folder / shard.name
    mend = f"run `python -m data_prep verify {manifest.path}`"
    if not tar.is_file():
        raise FileNotFoundError(f"{tar} is missing, but {manifest.path} names it: {mend}")
    if (size := tar.stat().st_size) != shard.bytes:
        raise ValueError(f"{tar} has {size} bytes, {manifest.path} says {shard.bytes}: {mend}")
    return index_records(manifest, shard)


def index_records(manifest: Manifest, shard: ShardRecord) -> np.ndarray:
    """The shard's records. Errors: ValueError, FileNotFoundError where the index is not what the manifest says."""
    mend = f"run `python -m data_prep verify {manifest.path}`"
    path: Path = manifest.folder / shard.index_name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {mend}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise ValueError(f"{path} is not the index that {manifest.path} tells of: {mend}")
    count, crc_known = check_index(data, path)
    if count != shard.samples:
        raise ValueError(f"{path} has {count} samples, {manifest.path} says {shard.samples}: {mend}")
    if not crc_known:
        raise ValueError(f"{path} holds no CRCs (a foreign tar's): add them with `python -m data_prep index --hash`")
    return records_of(data)


def records_of(data: bytes) -> np.ndarray:
    """The records (offset, size, label, crc32) of an index file that check_index has passed."""
    return np.frombuffer(data[INDEX_HEADER.size : -INDEX_TRAILER.size], dtype=_RECORD)


def _check_labels(labels: np.ndarray, manifest: Manifest) -> None:
    counts = tuple(np.bincount(labels, minlength=len(manifest.classes)).tolist()) if labels.min() >= 0 else ()
    if counts != manifest.class_counts:
        raise ValueError(f"the labels in the indexes beside {manifest.path} are not those it counts: write it again")
