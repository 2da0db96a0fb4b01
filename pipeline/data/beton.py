"""Random access to an FFCV .beton, in the project's own order.

The file is opened by ffcv's Reader and its pictures are decoded, cropped and resized by ffcv's native code. ffcv's
Loader is not used: it takes a custom order only in name, draws crops from an unseeded generator, compiles for 8 CPU
seconds in each process, and blocks when its thread fails. Native calls here run on threads and release the GIL.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from data_prep.manifest import Manifest, check_index
from pipeline.data.augment import AugmentConfig, Crop, center_crop, training_crops
from pipeline.data.batch import Batch
from pipeline.data.decode import MAX_PIXELS, decode_rgb, jpeg_size
from pipeline.data.shards import records_of

_JPG, _RAW = 0, 1  # ffcv's IMAGE_MODES
_MEND = "write the .beton again with `python -m data_prep beton`"


class BetonReader:
    """One split's .beton. Metadata is checked against the file and the manifest before native code trusts it."""

    def __init__(self, manifest: Manifest, image_size: int, augment: AugmentConfig, seed: int, threads: int) -> None:
        self._reader = _open(manifest)
        self._libffcv = _import_ffcv()[1]
        self.classes = manifest.classes
        self.image_size = image_size
        self.augment = augment
        self.seed = seed
        self.path = manifest.folder / manifest.beton.name if manifest.beton else Path()
        image_field, label_field = _fields(self._reader, self.path)
        self._pictures = self._reader.metadata[image_field]
        self.labels = self._reader.metadata[label_field].astype(np.int64).reshape(-1)
        self._bytes = np.memmap(self.path, "uint8", mode="r")
        self._sizes = self._check(manifest)
        self._crcs = self._checked_crcs(manifest)
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="beton")

    def batch(self, sample_ids: np.ndarray, epoch: int | None) -> Batch:
        sizes = [(int(p["width"]), int(p["height"])) for p in self._pictures[sample_ids]]
        if epoch is None:
            crops = [center_crop(*size, self.image_size, self.augment) for size in sizes]
        else:
            crops = training_crops(sizes, sample_ids, self.seed, epoch, self.augment)
        images = np.empty((len(sample_ids), self.image_size, self.image_size, 3), np.uint8)
        # list() re-raises what a thread raised: an error never becomes an empty picture.
        list(self._pool.map(self._decode, sample_ids.tolist(), crops, images))
        ids = torch.as_tensor(sample_ids, dtype=torch.int64)
        return Batch(torch.from_numpy(images), torch.from_numpy(self.labels[sample_ids]), ids)

    def _decode(self, sample_id: int, crop: Crop, out: np.ndarray) -> None:
        """Decodes the picture, and resizes its crop with OpenCV's INTER_AREA into out (size, size, 3)."""
        meta = self._pictures[sample_id]
        start, height, width = int(meta["data_ptr"]), int(meta["height"]), int(meta["width"])
        stored = self._bytes[start : start + self._sizes[sample_id]]
        if zlib.crc32(stored.data) != self._crcs[sample_id]:
            raise ValueError(
                f"sample {sample_id} of {self.path}: the bytes are not those that were written (CRC differs); {_MEND}"
            )
        if meta["mode"] == _RAW:
            picture = stored.reshape(height, width, 3)
        else:
            picture = self._decode_jpeg(stored, height, width, sample_id)
        c = crop
        self._libffcv.resize_crop(picture, c.top, c.top + c.height, c.left, c.left + c.width, out)
        if crop.flip:
            out[:] = out[:, ::-1].copy()

    def _decode_jpeg(self, stored: np.ndarray, height: int, width: int, sample_id: int) -> np.ndarray:
        """uint8 (height, width, 3). Errors: ValueError naming the sample.

        ffcv's decoder alone passes 482 of 600 single-bit flips as pictures, hence the CRC before; and where the
        metadata's size is not the JPEG's it leaves parts of the buffer as they were, with the status of a success.
        """
        where = f"sample {sample_id} of {self.path}"
        data = stored.tobytes()
        if (size := jpeg_size(data)) != (width, height):
            raise ValueError(
                f"{where}: the JPEG is {size}, the metadata say {(width, height)} (width, height); {_MEND}"
            )
        picture = np.empty((height, width, 3), np.uint8)
        if self._libffcv.imdecode(stored, picture, height, width, height, width) == 0:
            return picture
        # turbojpeg reports mere warnings (stray bytes between markers) like errors: Pillow is the judge.
        return np.asarray(decode_rgb(data, where))

    def _checked_crcs(self, manifest: Manifest) -> np.ndarray:
        """CRC-32 of each sample's stored bytes, uint32 (n,), of the index beside the file.

        Errors: FileNotFoundError or ValueError where the index is not as recorded, or says otherwise than ffcv's
        metadata, which native code is about to trust.
        """
        assert manifest.beton is not None
        mend = f"write it again with `python -m data_prep beton {manifest.path}`"
        path = manifest.folder / manifest.beton.index_name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, which holds the CRCs of {self.path}: {mend}")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest.beton.index_sha256:
            raise ValueError(f"{path} is not the index that {manifest.path} tells of: {mend}")
        check_index(data, path)
        records = records_of(data)
        if len(records) != len(self.labels):
            raise ValueError(f"{self.path} holds {len(self.labels)} samples, {path} {len(records)}: {mend}")
        wrong = (
            (records["offset"] != self._pictures["data_ptr"])
            | (records["size"] != self._sizes)
            | (records["label"] != self.labels)
        )
        if wrong.any():
            raise ValueError(f"{self.path}: sample {int(wrong.argmax())} has other metadata than in {path}: {mend}")
        return records["crc32"]

    def _check(self, manifest: Manifest) -> np.ndarray:
        """Byte sizes by sample id, after checking that every picture lies inside the file."""
        mend = f"write it again with `python -m data_prep beton {manifest.path}`"
        known = self.labels.min() >= 0
        counts = tuple(np.bincount(self.labels, minlength=len(self.classes)).tolist()) if known else ()
        if counts != manifest.class_counts:
            raise ValueError(f"{self.path} holds other labels than {manifest.path} says: {mend}")
        table = np.sort(self._reader.alloc_table, order="ptr")
        pointers = self._pictures["data_ptr"]
        if len(table) != len(pointers):
            raise ValueError(f"{self.path}: its table tells of {len(table)} pictures of {len(pointers)}: {mend}")
        place = np.clip(np.searchsorted(table["ptr"], pointers), 0, len(table) - 1)
        sizes = table["size"][place]
        pixels = self._pictures["height"].astype(np.int64) * self._pictures["width"]
        wrong = (
            (table["ptr"][place] != pointers)
            | (table["sample_id"][place] != np.arange(len(table)))  # another sample's picture
            | (sizes > len(self._bytes))  # first, since the sum may wrap around
            | (pointers + sizes > len(self._bytes))
            | ~np.isin(self._pictures["mode"], (_JPG, _RAW))
            | (pixels == 0)
            | (pixels > MAX_PIXELS)
            | ((self._pictures["mode"] == _RAW) & (sizes != pixels * 3))
        )
        if wrong.any():
            raise ValueError(f"{self.path}: sample {int(wrong.argmax())} has damaged metadata: {mend}")
        return sizes.astype(np.int64)


def _open(manifest: Manifest):
    """ffcv's Reader on the manifest's .beton, after checking that it is the file the manifest tells of."""
    record = manifest.beton
    mend = f"write it with `python -m data_prep beton {manifest.path}`"
    if record is None:
        raise FileNotFoundError(f"{manifest.path} has no .beton, but data.format is ffcv: {mend}")
    path = manifest.folder / record.name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {mend}")
    if (size := path.stat().st_size) != record.bytes:
        raise ValueError(f"{path} has {size} bytes, {manifest.path} says {record.bytes}: {mend}")
    reader_module, _ = _import_ffcv()
    try:
        reader = reader_module.Reader(str(path))
    except Exception as error:  # numpy and ffcv raise whatever they like at broken headers, MemoryError too
        raise ValueError(f"{path} is not a readable .beton ({error}): {mend}") from error
    if not reader.num_samples == len(reader.metadata) == manifest.num_samples:
        raise ValueError(f"{path} holds {reader.num_samples} samples, {manifest.path} {manifest.num_samples}: {mend}")
    return reader


def _import_ffcv():
    # ffcv starts numba's threads when imported. Those of TBB, numba's first choice, make a process that forks later
    # (the DataLoader's workers) hang at its exit where there is one core alone. No numba code runs here.
    os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    try:
        from ffcv import libffcv, reader
    except ImportError as error:
        raise ValueError(
            f"data.format ffcv: the ffcv package cannot be imported ({error}); run `make setup` "
            "(it needs Debian's libopencv-dev, libturbojpeg0-dev and pkg-config), or use data.format wds"
        ) from error
    return reader, libffcv


def _fields(reader, path: Path) -> tuple[str, str]:
    """ffcv names metadata columns f0, f1, ... in the order of the fields."""
    names = list(reader.handlers)
    if not {"image", "label"} <= set(names):
        raise ValueError(
            f"{path} has the fields {names}, not `image` and `label`: write it with `python -m data_prep beton`"
        )
    return f"f{names.index('image')}", f"f{names.index('label')}"
