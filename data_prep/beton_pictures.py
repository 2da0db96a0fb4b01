"""Runs of pictures on their way into a .beton, whether they come from shards or straight from a source."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, overload

import numpy as np
from isal.isal_zlib import crc32

from data_prep.beton_format import Stored
from data_prep.images import PictureError, PictureOptions, decode_rgb, prepare_picture, reduced_rgb
from data_prep.index_records import INDEX
from data_prep.jpeg import COMMON_FRAMES, jpeg_header
from data_prep.manifest import IndexEntry, Manifest, Note
from data_prep.sources import Listing, Sample, Source
from data_prep.tar_shards import read_index, read_pictures

CHUNK_SAMPLES = 64
# Of pixels in their original sizes; of photographs from a camera, 36 MB each, 8 are enough to wait in memory.
CHUNK_OF_PIXELS = 8
CHUNK_BYTES = 32 << 20


class Form(NamedTuple):
    """How pictures are stored."""

    mode: str  # "jpg", "raw" or "proportion"
    max_resolution: int | None  # longest side in pixels
    jpeg_quality: int | None  # of those that are encoded anew; None where none can be

    def of(self, sample_id: int) -> str:
        """ "jpg" or "raw": by id, so that the file is the same whatever process encodes it, and however often."""
        if self.mode != "proportion":
            return self.mode
        return "jpg" if hashlib.sha256(sample_id.to_bytes(8, "little")).digest()[0] < 128 else "raw"

    def chunk_samples(self) -> int:
        """How many pictures one job takes: enough that handing them over costs little, few enough to wait in memory."""
        if self.mode == "jpg":
            return CHUNK_SAMPLES
        if self.max_resolution is None:
            return CHUNK_OF_PIXELS
        return min(CHUNK_SAMPLES, max(1, CHUNK_BYTES // (3 * self.max_resolution**2)))


class Done(NamedTuple):
    """One job's pictures, as they are to be written."""

    stored: list[Stored]
    repaired: list[Note]


class Run(Protocol):
    """Consecutive samples, for one process to store."""

    def store(self, form: Form) -> Done:
        """Errors: ValueError or OSError naming the picture and the mend."""


@dataclass(frozen=True)
class ShardRun:
    """Samples of one tar."""

    tar: Path
    first_id: int
    records: np.ndarray  # INDEX
    # A foreign tar was indexed only: its pictures have not been decoded by anyone here.
    prepared: bool

    def store(self, form: Form) -> Done:
        entries = [IndexEntry(*record) for record in self.records.tolist()]
        stored = []
        for place, data in enumerate(read_pictures(self.tar, entries)):
            sample_id = self.first_id + place
            try:
                if not self.prepared and (reason := prepare_picture(data, PictureOptions()).reason) is not None:
                    raise PictureError(f"no plain JPEG ({reason})")
                stored.append(store(data, sample_id, form))
            except PictureError as error:
                raise ValueError(
                    f"{self.tar}: the picture at byte {entries[place].offset} (sample {sample_id}): {error}; write "
                    "shards of such pictures with `python -m data_prep shard --source MANIFEST` first, which mends them"
                ) from error
        return Done(stored, [])


@dataclass(frozen=True)
class SourceRun:
    """Samples of a source, prepared as `shard` would prepare them."""

    source: Source
    first_id: int
    samples: tuple[Sample, ...]
    max_megapixels: float

    def store(self, form: Form) -> Done:
        stored, repaired = [], []
        for place, (sample, data) in enumerate(zip(self.samples, self.source.read(self.samples), strict=True)):
            try:
                prepared = prepare_picture(data, PictureOptions(max_megapixels=self.max_megapixels))
                stored.append(store(prepared.data, self.first_id + place, form))
            except PictureError as error:
                raise ValueError(
                    f"{self.source.where(sample.path)}: {error}; mend or remove it, or write shards with "
                    "`shard --on-error skip` and the .beton from them"
                ) from error
            if prepared.reason is not None:
                repaired.append(Note(sample.key, sample.path, prepared.reason))
        return Done(stored, repaired)


def store(data: bytes, sample_id: int, form: Form) -> Stored:
    """The stored form of a JPEG that a shard holds. Only a picture larger than `max_resolution` is encoded anew.

    Errors: PictureError.
    """
    header = jpeg_header(data)
    if header is None or header.frame not in COMMON_FRAMES or len(header.components) not in (1, 3):
        raise PictureError("no baseline or progressive JPEG, in colour or grey")
    mode, limit = form.of(sample_id), form.max_resolution
    fits = limit is None or max(header.width, header.height) <= limit
    if mode == "jpg":
        if fits:
            return Stored(mode, header.width, header.height, data, crc32(data))
        options = PictureOptions(max_side=limit, jpeg_quality=form.jpeg_quality)
        reduced = prepare_picture(data, options)
        return Stored(mode, reduced.width, reduced.height, reduced.data, crc32(reduced.data))
    pixels = decode_rgb(data) if fits else reduced_rgb(data, PictureOptions(max_side=limit))
    height, width, _ = pixels.shape
    payload = pixels.tobytes()
    return Stored(mode, width, height, payload, crc32(payload))


@dataclass(frozen=True)
class Pictures(Sequence[Run]):
    """A split's pictures in the .beton's order. Each run is made when it is asked for: a million samples at once would
    take hundreds of megabytes.
    """

    labels: np.ndarray  # (n,)
    spans: list[tuple[int, int]]  # (first sample id, one after the last) of each run
    make: Callable[[int, int], Run]

    def __len__(self) -> int:
        return len(self.spans)

    @overload
    def __getitem__(self, index: int) -> Run: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Run]: ...
    def __getitem__(self, index: int | slice) -> Run | Sequence[Run]:
        if isinstance(index, slice):
            return [self.make(*span) for span in self.spans[index]]
        return self.make(*self.spans[index])


def pictures_of_shards(manifest: Manifest, form: Form) -> Pictures:
    """In the manifest's order. Errors: FileNotFoundError or ValueError naming the index that is not as recorded."""
    records = shard_records(manifest)
    ends = np.cumsum([shard.samples for shard in manifest.shards]).tolist()
    # Only `shard` tells how large a picture it takes; `index` looks at none.
    prepared = "max_megapixels" in manifest.options

    def run(start: int, end: int) -> Run:
        tar = manifest.folder / manifest.shards[bisect_right(ends, start)].name
        return ShardRun(tar, start, records[start:end], prepared)

    return Pictures(records["label"], _spans(ends, form.chunk_samples()), run)


def pictures_of_source(
    source: Source, listing: Listing, plan: list[np.ndarray], form: Form, max_megapixels: float
) -> Pictures:
    """In the order that `plan` (of plan.plan_shards) gives to the listing's samples."""
    order = np.concatenate(plan)
    ends = np.cumsum([len(shard) for shard in plan]).tolist()
    # Of Parquet files each run reads its row groups anew: then a run is as long as a shard, whatever it holds.
    chunk = form.chunk_samples() if listing.runs is None else len(order)

    def run(start: int, end: int) -> Run:
        samples = tuple(listing.sample(index) for index in order[start:end].tolist())
        return SourceRun(source, start, samples, max_megapixels)

    return Pictures(listing.labels[order], _spans(ends, chunk), run)


def shard_records(manifest: Manifest) -> np.ndarray:
    """The indexes of all shards, one after another, dtype INDEX."""
    return np.concatenate([np.array(read_index(manifest.folder, shard), INDEX) for shard in manifest.shards])


def _spans(ends: list[int], step: int) -> list[tuple[int, int]]:
    """Runs of `step` samples that do not reach over any of `ends`."""
    starts = [0, *ends[:-1]]
    return [
        (at, min(at + step, end)) for start, end in zip(starts, ends, strict=True) for at in range(start, end, step)
    ]
