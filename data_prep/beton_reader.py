"""Samples of a .beton through ffcv's own reader and decoder: what `verify` compares with the shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from data_prep.beton_format import MODES
from data_prep.images import decode_rgb
from data_prep.index_records import index_records
from data_prep.manifest import check_index

# ffcv decodes with turbojpeg's fast DCT: over the 250 ImageNet pictures the mean difference from Pillow is 1 to 2
# levels. Another picture, or a buffer left over from the last one, is tens of levels away.
MAX_MEAN_DIFFERENCE = 6.0


def load_ffcv() -> Any:
    """Imports ffcv (seconds: it brings torch and numba). Errors: ValueError with the mend."""
    # ffcv starts numba's threads, and a process forked after TBB's never exits on one core.
    os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    try:
        import ffcv.libffcv
        import ffcv.reader
    except (ImportError, OSError) as error:
        raise ValueError(
            f"ffcv cannot be imported ({error}): run `make setup`; it needs Debian's libopencv-dev libturbojpeg0-dev "
            "pkg-config"
        ) from error
    return ffcv


class BetonReader:
    """A .beton and the index beside it. Errors: ValueError naming the file, and the sample."""

    def __init__(self, path: Path) -> None:
        self.path = path
        ffcv = load_ffcv()
        try:
            reader = ffcv.reader.Reader(str(path))
            self.images, self.labels = (reader.metadata[name] for name in reader.metadata.dtype.names)
            table = np.sort(reader.alloc_table, order="sample_id")
            names = list(reader.field_names)
        except Exception as error:  # numpy and ffcv raise whatever they like at broken headers
            raise ValueError(f"{path} cannot be read by ffcv ({error}): write it again") from error
        if names != ["image", "label"] or len(self.images) != reader.num_samples:
            raise ValueError(f"{path} does not hold {reader.num_samples} samples of image and label: write it again")
        self.index = _index_of(path, self.images, self.labels, table)
        self.bytes = np.memmap(path, np.uint8, mode="r")
        self.imdecode = ffcv.libffcv.imdecode

    def __len__(self) -> int:
        return len(self.images)

    def payload(self, sample_id: int) -> np.ndarray:
        """The stored bytes, uint8 (n,), whose CRC is the index's."""
        start, size, _, crc = self.index[sample_id].tolist()
        payload = self.bytes[start : start + size]
        if not size or len(payload) != size:
            raise ValueError(f"{self.path}: sample {sample_id} lies outside the file: write it again")
        if crc32(payload.data) != crc:
            raise ValueError(f"{self.path}: sample {sample_id} has another CRC than the index says: write it again")
        return payload

    def picture(self, sample_id: int) -> np.ndarray:
        """uint8 (H, W, 3), as ffcv decodes it. Errors: ValueError naming the sample where ffcv gets it wrong."""
        image, payload = self.images[sample_id], self.payload(sample_id)
        height, width = int(image["height"]), int(image["width"])
        if image["mode"] == MODES["raw"]:
            if len(payload) != height * width * 3:
                raise ValueError(f"{self.path}: sample {sample_id}: {len(payload)} bytes for {height}x{width} pixels")
            return payload.reshape(height, width, 3)
        pixels = np.zeros((height, width, 3), np.uint8)
        whole = (height, width, 0, 0, 1, 1, False, False)  # no crop, no scaling, no flip
        status = self.imdecode(np.ascontiguousarray(payload), pixels, height, width, *whole)
        # turbojpeg reports mere warnings in the same way (stray bytes between markers): then Pillow is the judge.
        if status != 0 and not similar(pixels, decode_rgb(payload.tobytes())):
            raise ValueError(f"{self.path}: ffcv cannot decode sample {sample_id}: use --mode raw, or mend the picture")
        return pixels


def similar(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.abs(one.astype(np.int16) - other).mean() <= MAX_MEAN_DIFFERENCE


def _index_of(path: Path, images: np.ndarray, labels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The index's records, dtype INDEX, which say the same of each sample as ffcv's tables do."""
    index_path = path.with_name(f"{path.name}.idx")
    if not index_path.is_file():
        raise ValueError(f"{index_path} is missing: write the .beton again")
    data = index_path.read_bytes()
    check_index(data, index_path)
    records = index_records(data)
    if not len(records) == len(images) == len(table):
        raise ValueError(
            f"{path} holds {len(images)} samples, its table {len(table)}, {index_path} {len(records)}: write it again"
        )
    wrong = (
        (records["offset"] != images["data_ptr"])
        | (records["label"] != labels)
        | (table["sample_id"] != np.arange(len(table)))
        | (table["ptr"] != records["offset"])
        | (table["size"] != records["size"])
    )
    if wrong.any():
        raise ValueError(f"{path}: sample {int(wrong.argmax())} is not where {index_path} says: write it again")
    return records
