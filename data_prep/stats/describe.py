"""A split's pictures in figures: spreads, counts, and histograms for the plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from data_prep.manifest import Manifest, Note
from data_prep.stats.records import FORMS

MOST_COMMON_SIZES = 8
BINS_PER_OCTAVE = 12  # of histograms: each bin is 6 % wider than the one before
SIDE_OCTAVES = (0, 16)  # 1 to 65,536 pixels
BYTES_OCTAVES = (5, 32)
ASPECT_OCTAVES = (-4, 4)
BITS_OCTAVES = (-5, 6)


@dataclass(frozen=True)
class Spread:
    """Of one quantity over a split's pictures; percentiles are interpolated."""

    min: float
    percentile_5: float
    median: float
    percentile_95: float
    max: float
    mean: float


@dataclass(frozen=True)
class SizeCount:
    width: int
    height: int
    pictures: int


@dataclass(frozen=True)
class ClassCount:
    name: str
    readable: str  # empty where the manifest has no readable names
    pictures: int


@dataclass(frozen=True)
class Histograms:
    """Pictures in bins of BINS_PER_OCTAVE; what lies outside the octaves is counted in the first and last bin."""

    sides: np.ndarray  # (width, height)
    aspect: np.ndarray
    bytes: np.ndarray
    bits: np.ndarray


@dataclass(frozen=True)
class SplitStats:
    """One manifest's pictures."""

    name: str
    manifest: str
    pictures: int
    bytes: int  # of the pictures
    shards: int
    shard_bytes: int
    read_whole: int  # pictures of which more than the header had to be read, as their indexes know no CRCs
    spreads: dict[str, Spread]
    sizes: tuple[SizeCount, ...]  # the most common
    different_sizes: int
    forms: dict[str, int]
    progressive: int
    classes: tuple[ClassCount, ...]  # in the order of the labels
    repaired: dict[str, int]  # by reason
    skipped: dict[str, int]
    histograms: Histograms = field(compare=False, repr=False)


def describe(name: str, where: str, manifest: Manifest, records: np.ndarray, read_whole: int) -> SplitStats:
    """`records`: (n,) of RECORD, in the manifest's order."""
    width, height = (records[side].astype(np.float64) for side in ("width", "height"))
    size = records["size"].astype(np.float64)
    aspect, bits = width / height, 8 * size / (width * height)
    quantities = {
        "width": width,
        "height": height,
        "shorter_side": np.minimum(width, height),
        "aspect_ratio": aspect,
        "bytes": size,
        "bits_per_pixel": bits,
    }
    sizes, different_sizes = _sizes(records)
    counts = np.bincount(records["label"], minlength=len(manifest.classes)).tolist()
    readable = manifest.class_names or ("",) * len(manifest.classes)
    forms = np.bincount(records["form"], minlength=len(FORMS)).tolist()
    return SplitStats(
        name=name,
        manifest=where,
        pictures=len(records),
        bytes=int(size.sum()),
        shards=len(manifest.shards),
        shard_bytes=sum(shard.bytes for shard in manifest.shards),
        read_whole=read_whole,
        spreads={what: _spread(values) for what, values in quantities.items()},
        sizes=sizes,
        different_sizes=different_sizes,
        forms={form: count for form, count in zip(FORMS, forms, strict=True) if count},
        progressive=int(records["progressive"].sum()),
        classes=tuple(map(ClassCount, manifest.classes, readable, counts)),
        repaired=_by_reason(manifest.repaired),
        skipped=_by_reason(manifest.skipped),
        histograms=Histograms(
            sides=_sides(width, height),
            aspect=_histogram(aspect, ASPECT_OCTAVES),
            bytes=_histogram(size, BYTES_OCTAVES),
            bits=_histogram(bits, BITS_OCTAVES),
        ),
    )


def edges(octaves: tuple[int, int]) -> np.ndarray:
    """Borders of the bins."""
    return 2.0 ** (np.arange(octaves[0] * BINS_PER_OCTAVE, octaves[1] * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE)


def _spread(values: np.ndarray) -> Spread:
    low, median, high = np.percentile(values, [5, 50, 95]).tolist()
    return Spread(float(values.min()), low, median, high, float(values.max()), float(values.mean()))


def _sizes(records: np.ndarray) -> tuple[tuple[SizeCount, ...], int]:
    """(the most common sizes, how many there are)"""
    packed = records["width"].astype(np.uint64) << np.uint64(32) | records["height"]
    values, counts = np.unique(packed, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_COMMON_SIZES]
    pairs = zip(values[order].tolist(), counts[order].tolist(), strict=True)
    return tuple(SizeCount(value >> 32, value & 0xFFFFFFFF, count) for value, count in pairs), len(values)


def _bins(values: np.ndarray, octaves: tuple[int, int]) -> np.ndarray:
    low, high = (octave * BINS_PER_OCTAVE for octave in octaves)
    return np.clip(np.floor(np.log2(values) * BINS_PER_OCTAVE).astype(np.int64) - low, 0, high - low - 1)


def _histogram(values: np.ndarray, octaves: tuple[int, int]) -> np.ndarray:
    return np.bincount(_bins(values, octaves), minlength=(octaves[1] - octaves[0]) * BINS_PER_OCTAVE)


def _sides(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    bins = (SIDE_OCTAVES[1] - SIDE_OCTAVES[0]) * BINS_PER_OCTAVE
    flat = _bins(width, SIDE_OCTAVES) * bins + _bins(height, SIDE_OCTAVES)
    return np.bincount(flat, minlength=bins * bins).reshape(bins, bins)


def _by_reason(notes: Iterable[Note]) -> dict[str, int]:
    return dict(Counter(note.reason for note in notes).most_common())
