"""Manifest -> .beton: the shards' samples, in the manifest's order, in FFCV's format.

ffcv's own writer waits for ever when one of its workers dies, re-encodes every JPEG, and draws `proportion` from an
unseeded generator. Here a pool encodes, in order, and ffcv's code lays out the file in this process alone: an error is
an error, originals pass through, and the same shards give the same file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import queue
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import Value
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from PIL import Image

from data_prep.images import decode_rgb, picture_size
from data_prep.manifest import BetonRecord, IndexEntry, Manifest, atomic_path, read_manifest, write_manifest
from data_prep.tar_shards import file_sha256, read_index, read_pictures
from data_prep.workers import Progress, map_ordered, silent

DEFAULT_QUALITY = 90  # ffcv's own
MODES = {"jpg": 0, "raw": 1}  # as ffcv numbers them in the file
CHUNK_SAMPLES = 64
CHUNK_BYTES = 32 << 20
SMALL_PAGE, PAGE = 2 << 20, 8 << 20  # ffcv's smallest, and its default
# ffcv decodes with turbojpeg's fast DCT: over the 250 ImageNet pictures the mean difference from Pillow is 1 to 2
# levels. Another picture, or a buffer left over from the last one, is tens of levels away.
MAX_MEAN_DIFFERENCE = 6.0


@dataclass(frozen=True)
class BetonOptions:
    """Write an FFCV .beton of a manifest's samples, in its order, read from its shards."""

    manifest: tyro.conf.Positional[Path]
    """The split's *.manifest.json."""
    mode: Literal["jpg", "raw", "proportion"] = "jpg"
    """jpg keeps the shards' JPEGs as they are; raw stores pixels; proportion half of each, chosen by sample id."""
    max_resolution: int | None = None
    """Longest side in pixels; larger pictures are reduced to it. None keeps all sizes."""
    jpeg_quality: int | None = None
    """Quality of pictures that are reduced and stored as JPEG (90 if None)."""
    processes: int = 2
    """Local processes that decode and encode; the result does not depend on it."""

    def __post_init__(self) -> None:
        if self.max_resolution is not None and not 1 <= self.max_resolution <= 65500:
            raise ValueError(f"--max-resolution {self.max_resolution}: must be 1 to 65500")
        if self.jpeg_quality is not None:
            if not 1 <= self.jpeg_quality <= 100:
                raise ValueError(f"--jpeg-quality {self.jpeg_quality}: must be 1 to 100")
            if self.mode == "raw" or self.max_resolution is None:
                raise ValueError(
                    "--jpeg-quality would change nothing: only pictures that --max-resolution reduces are encoded "
                    "anew, and raw stores no JPEG"
                )
        if self.processes < 1:
            raise ValueError(f"--processes {self.processes}: must be at least 1")

    @property
    def quality(self) -> int | None:
        """What the record says: None where nothing is encoded."""
        if self.mode == "raw" or self.max_resolution is None:
            return None
        return DEFAULT_QUALITY if self.jpeg_quality is None else self.jpeg_quality


class Stored(NamedTuple):
    """One sample's picture as it lies in the file."""

    mode: str  # "jpg" or "raw"
    height: int  # pixels
    width: int
    payload: bytes  # a JPEG, or height x width x 3 bytes


@dataclass(frozen=True)
class _Chunk:
    """Consecutive samples of one shard, for one process to encode."""

    tar: Path
    first_id: int
    entries: tuple[IndexEntry, ...]
    mode: str
    max_resolution: int | None
    quality: int | None


def load_ffcv() -> Any:
    """Imports ffcv (seconds: it brings torch and numba). Errors: ValueError with the mend."""
    # ffcv starts numba's threads, and a process forked after TBB's never exits on one core.
    os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    try:
        import ffcv.fields
        import ffcv.libffcv
        import ffcv.memory_allocator
        import ffcv.reader
        import ffcv.writer
    except (ImportError, OSError) as error:
        raise ValueError(
            f"ffcv cannot be imported ({error}): run `make setup`; it needs Debian's libopencv-dev libturbojpeg0-dev "
            "pkg-config"
        ) from error
    return ffcv


def write_beton(options: BetonOptions, on_done: Progress = silent) -> Manifest:
    """Writes `<split>.beton` beside the manifest, verifies it, and returns the manifest with its record.

    Does nothing where the same file is there already. `on_done` hears of samples as they are written, and again as they
    are verified, out of twice their number.
    Errors: ValueError or OSError (ChildProcessError where a process died); nothing is then left under the final name.
    """
    manifest = read_manifest(options.manifest)
    path = manifest.folder / f"{manifest.split}.beton"
    if _is_there(manifest, options, path):
        return manifest
    ffcv = load_ffcv()
    if manifest.beton is not None:
        manifest = dataclasses.replace(manifest, beton=None)
        write_manifest(manifest)  # the old record must not describe the new file, not for a moment
    largest = largest_payload(manifest, options)
    with atomic_path(path) as temporary:
        checks = _write(ffcv, temporary, manifest, options, largest, on_done)
        verify_written(temporary, manifest, checks, on_done)
        record = BetonRecord(
            name=path.name,
            samples=manifest.num_samples,
            bytes=temporary.stat().st_size,
            sha256=file_sha256(temporary),
            mode=options.mode,
            max_resolution=options.max_resolution,
            jpeg_quality=options.quality,
        )
    manifest = dataclasses.replace(manifest, beton=record)
    write_manifest(manifest)
    return manifest


def _is_there(manifest: Manifest, options: BetonOptions, path: Path) -> bool:
    record = manifest.beton
    wanted = (options.mode, options.max_resolution, options.quality)
    return (
        record is not None
        and (record.mode, record.max_resolution, record.jpeg_quality) == wanted
        and path.is_file()
        and file_sha256(path) == record.sha256
    )


def largest_payload(manifest: Manifest, options: BetonOptions) -> int:
    """Upper bound of one stored picture's bytes: ffcv's page must hold it."""
    largest = max(entry.size for shard in manifest.shards for entry in read_index(manifest.folder, shard))
    if options.mode == "jpg" and options.max_resolution is None:
        return largest
    if options.max_resolution is not None:
        # A JPEG at quality 100 stays under its pixels' bytes, but for headers and tables.
        return max(largest, 3 * options.max_resolution**2 + (64 << 10))
    for shard in manifest.shards:
        for data in read_pictures(manifest.folder / shard.name, read_index(manifest.folder, shard)):
            width, height = picture_size(data)
            largest = max(largest, 3 * width * height)
    return largest


def encode(data: bytes, sample_id: int, mode: str, max_resolution: int | None, quality: int | None) -> Stored:
    """The stored form of one JPEG. Only a picture larger than `max_resolution` is encoded anew."""
    if mode == "proportion":
        # By id, so that the file is the same whatever process encodes it, and however often.
        mode = "jpg" if hashlib.sha256(sample_id.to_bytes(8, "little")).digest()[0] < 128 else "raw"
    width, height = picture_size(data)
    fits = max_resolution is None or max(width, height) <= max_resolution
    if mode == "jpg" and fits:
        return Stored("jpg", height, width, data)
    image = Image.fromarray(decode_rgb(data))
    if not fits:
        assert max_resolution is not None
        scale = max_resolution / max(width, height)
        # Rounded down as ffcv does, but never to nothing; a box filter is its INTER_AREA.
        size = max(1, int(width * scale)), max(1, int(height * scale))
        image = image.resize(size, Image.Resampling.BOX)
    if mode == "raw":
        return Stored("raw", image.height, image.width, image.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Stored("jpg", image.height, image.width, buffer.getvalue())


def _encode_chunk(chunk: _Chunk) -> list[Stored]:
    pictures = read_pictures(chunk.tar, chunk.entries)
    return [
        encode(data, chunk.first_id + place, chunk.mode, chunk.max_resolution, chunk.quality)
        for place, data in enumerate(pictures)
    ]


def _chunks(manifest: Manifest, options: BetonOptions, largest: int) -> Iterator[_Chunk]:
    size = max(1, min(CHUNK_SAMPLES, CHUNK_BYTES // largest))
    first_id = 0
    for shard in manifest.shards:
        entries = read_index(manifest.folder, shard)
        for start in range(0, len(entries), size):
            part = tuple(entries[start : start + size])
            tar = manifest.folder / shard.name
            yield _Chunk(tar, first_id, part, options.mode, options.max_resolution, options.quality)
            first_id += len(part)


@dataclass
class _InOrder:
    """What ffcv calls an indexed dataset: samples are asked for in order, each once."""

    stored: Iterator[Stored]
    labels: list[int]
    on_done: Progress
    checks: list[tuple[str, int]]  # filled here: (mode, CRC-32 of the payload), a sample

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Stored, int]:
        assert index == len(self.checks), "ffcv asked out of order"
        stored = next(self.stored)
        self.checks.append((stored.mode, zlib.crc32(stored.payload)))
        self.on_done(1, 2 * len(self.labels))
        return stored, self.labels[index]


def _write(
    ffcv: Any,
    path: Path,
    manifest: Manifest,
    options: BetonOptions,
    largest: int,
    on_done: Progress,
) -> list[tuple[str, int]]:
    """Writes the file; returns each sample's (mode, CRC-32 of what was stored)."""
    chunks = list(_chunks(manifest, options, largest))
    labels = [entry.label for chunk in chunks for entry in chunk.entries]
    # Passing through is reading alone: other processes would only copy the bytes once more.
    passing = options.mode == "jpg" and options.max_resolution is None
    encoded = map_ordered(_encode_chunk, chunks, 1 if passing else options.processes)
    dataset = _InOrder((stored for chunk in encoded for stored in chunk), labels, on_done, [])
    image_field = ffcv.fields.RGBImageField()
    # On the instance: a subclass would change the field's type id, and ffcv's readers would not know it.
    image_field.encode = _store
    total = sum(shard.bytes for shard in manifest.shards)
    page = SMALL_PAGE if total < 8 * PAGE else PAGE
    while page < largest:
        page *= 2
    writer = _one_process_writer(ffcv, str(path), {"image": image_field, "label": ffcv.fields.IntField()}, page)
    writer.from_indexed_dataset(dataset)
    return dataset.checks


def _store(destination: Any, stored: Stored, malloc: Callable[[int], tuple[int, np.ndarray]]) -> None:
    """ffcv's RGBImageField.encode for a picture that is encoded already."""
    destination["mode"] = MODES[stored.mode]
    destination["height"], destination["width"] = stored.height, stored.width
    destination["data_ptr"], storage = malloc(len(stored.payload))
    storage[:] = np.frombuffer(stored.payload, np.uint8)


def _one_process_writer(ffcv: Any, path: str, fields: dict[str, Any], page_size: int) -> Any:
    """ffcv's DatasetWriter with its worker's loop run right here: no process that can die, nothing to wait for."""

    class OneProcessWriter(ffcv.writer.DatasetWriter):
        metadata_sm: Any

        def _write_common(
            self, num_samples: int, queue_content: Iterable[Any], work_fn: Callable[..., None], extra: tuple[Any, ...]
        ) -> None:
            self.num_samples = num_samples
            self.prepare()
            # prepare() made shared memory, which outlives a killed process; one process needs none.
            self.metadata_sm.close()
            self.metadata_sm.unlink()
            self.metadata_sm = types.SimpleNamespace(buf=bytearray(num_samples * self.metadata_type.itemsize))
            todo: queue.Queue[Any] = queue.Queue()
            for item in [*queue_content, None]:
                todo.put(item)
            allocator = ffcv.memory_allocator.MemoryAllocator(self.fname, self.data_region_start, self.page_size)
            allocations: queue.Queue[Any] = queue.Queue()
            shared = (todo, self.metadata_sm, self.metadata_type, self.fields, allocator, Value("Q"), allocations)
            work_fn(*shared, *extra)
            self.finalize(allocations.get_nowait())

    return OneProcessWriter(path, fields, page_size=page_size, num_workers=1)


class BetonReader:
    """Samples of a .beton through ffcv's reader and decoder. Errors: ValueError naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        ffcv = load_ffcv()
        try:
            reader = ffcv.reader.Reader(str(path))
            self.images, self.labels = (reader.metadata[name] for name in reader.metadata.dtype.names)
            sizes = {int(row["sample_id"]): int(row["size"]) for row in reader.alloc_table}
            names = list(reader.field_names)
        except Exception as error:  # numpy and ffcv raise whatever they like at broken headers
            raise ValueError(f"{path} cannot be read by ffcv ({error}): write it again") from error
        if names != ["image", "label"] or len(self.images) != reader.num_samples:
            raise ValueError(f"{path} does not hold {reader.num_samples} samples of image and label: write it again")
        self.sizes = sizes
        self.bytes = np.memmap(path, np.uint8, mode="r")
        self.imdecode = ffcv.libffcv.imdecode

    def __len__(self) -> int:
        return len(self.images)

    def payload(self, sample_id: int) -> np.ndarray:
        """The stored bytes, uint8 (n,)."""
        start = int(self.images[sample_id]["data_ptr"])
        payload = self.bytes[start : start + self.sizes.get(sample_id, 0)]
        if not len(payload) or len(payload) != self.sizes[sample_id]:
            raise ValueError(f"{self.path}: sample {sample_id} lies outside the file: write it again")
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


def verify_written(path: Path, manifest: Manifest, checks: list[tuple[str, int]], on_done: Progress) -> None:
    """Reopens the file with ffcv: count, labels, form and bytes of each sample, and every picture decodes.

    checks: (mode, CRC-32 of what was stored), a sample. Errors: ValueError naming the sample.
    """
    reader = BetonReader(path)
    if not len(reader) == len(checks) == manifest.num_samples:
        raise ValueError(f"{path} holds {len(reader)} samples, the manifest {manifest.num_samples}: write it again")
    labels = (entry.label for shard in manifest.shards for entry in read_index(manifest.folder, shard))
    for sample_id, ((mode, crc), label) in enumerate(zip(checks, labels, strict=True)):
        stored = int(reader.images[sample_id]["mode"]), int(reader.labels[sample_id])
        if stored != (MODES[mode], label) or zlib.crc32(reader.payload(sample_id).tobytes()) != crc:
            raise ValueError(f"{path}: sample {sample_id} is not what was written: the disk or its memory is at fault")
        reader.picture(sample_id)
        on_done(1, 2 * len(checks))
