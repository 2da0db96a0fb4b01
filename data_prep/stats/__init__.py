"""Sizes, classes and duplicates of the pictures in one manifest or several, from indexes and headers alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from data_prep.manifest import Manifest, parse_manifest, read_manifest
from data_prep.stats.describe import SplitStats, describe
from data_prep.stats.duplicates import Duplicates, Samples, find_duplicates
from data_prep.stats.records import RECORD, ShardJob, read_shard
from data_prep.storage import Folder, LocalFolder, open_file
from data_prep.workers import Progress, map_ordered, silent


@dataclass(frozen=True)
class StatsOptions:
    """Describe the pictures of one split or several: sizes, classes, and duplicates in and between them."""

    manifest: tyro.conf.Positional[tuple[str, ...]]
    """The *.manifest.json of each split, or their URLs."""
    output: Path | None = None
    """An HTML page to write, with plots. None: no page."""
    listed: int = 100
    """Groups of equal pictures that are named with their keys, of one class and of several each. All are counted."""
    processes: int = 2
    """Local processes that read pictures' headers; the result does not depend on it."""

    def __post_init__(self) -> None:
        if not self.manifest:
            raise ValueError("name one *.manifest.json or more")
        if self.listed < 0:
            raise ValueError(f"--listed {self.listed}: must be 0 or more")
        if self.processes < 1:
            raise ValueError(f"--processes {self.processes}: must be at least 1")


@dataclass(frozen=True)
class Stats:
    """What was found."""

    splits: tuple[SplitStats, ...]
    duplicates: Duplicates
    page: Path | None

    def to_json(self) -> dict[str, Any]:
        """All but the plots' histograms."""
        bare = dataclasses.asdict(self)
        for split in bare["splits"]:
            del split["histograms"]
        return bare | {"page": None if self.page is None else str(self.page)}

    def text(self) -> str:
        """Tables, as wide as the terminal."""
        from data_prep.stats.tables import as_text

        return as_text(self.splits, self.duplicates, self.page)


class _Split(NamedTuple):
    name: str
    url: str
    folder: Folder
    manifest: Manifest


def stats(options: StatsOptions, on_done: Progress = silent) -> Stats:
    """Reads the splits, and writes the page where one is asked for. `on_done` hears of samples and of bytes read.

    Errors: ValueError or OSError naming the manifest, the shard and sample, and the mend.
    """
    if options.output is not None:
        _check_output(options.output)
    splits = _open(options.manifest)
    samples = _read(splits, options.processes, on_done)
    total = len(samples.records)
    duplicates = find_duplicates(samples, options.listed, options.processes, lambda size: on_done(0, size, total))
    shard_samples = np.diff(samples.shard_starts)
    described, first = [], 0
    for split, start, end in zip(splits, samples.split_starts[:-1], samples.split_starts[1:], strict=True):
        shards = slice(first, first + len(split.manifest.shards))
        read_whole = int(shard_samples[shards][samples.whole[shards]].sum())
        described.append(describe(split.name, split.url, split.manifest, samples.records[start:end], read_whole))
        first = shards.stop
    if options.output is not None:
        from data_prep.stats.page import write_page  # matplotlib and jinja2

        write_page(described, duplicates, options.output)
    return Stats(tuple(described), duplicates, options.output)


def _check_output(output: Path) -> None:
    """Errors: ValueError, before any work is done."""
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name an .html file")
    if output.suffix not in (".html", ".htm"):
        raise ValueError(f"--output {output}: name an .html file")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}: make it first")


def _open(urls: Sequence[str]) -> list[_Split]:
    places = [open_file(url) for url in urls]
    if twice := [place for place, count in Counter(f.where(name) for f, name in places).items() if count > 1]:
        raise ValueError(f"{twice[0]} is named twice: name each manifest once")
    manifests = [_manifest(folder, name) for folder, name in places]
    for url, manifest in zip(urls, manifests, strict=True):
        if not manifest.shards:
            raise ValueError(f"{url} has no shards, only a .beton: write shards of the same source with `shard`")
        if not manifest.num_samples:
            raise ValueError(f"{url} has no pictures: write its shards again")
    names = Counter(manifest.split for manifest in manifests)
    return [
        _Split(m.split if names[m.split] == 1 else f"{m.split} ({url})", url, folder, m)
        for url, m, (folder, _) in zip(urls, manifests, places, strict=True)
    ]


def _manifest(folder: Folder, name: str) -> Manifest:
    if isinstance(folder, LocalFolder):
        return read_manifest(folder.path / name)
    return parse_manifest(folder.read(name), folder.where(name), Path())


def _read(splits: Sequence[_Split], processes: int, on_done: Progress) -> Samples:
    jobs = [
        ShardJob(split.folder, shard, len(split.manifest.classes), split.url)
        for split in splits
        for shard in split.manifest.shards
    ]
    shard_starts = np.cumsum([0, *(job.record.samples for job in jobs)])
    split_starts = np.cumsum([0, *(split.manifest.num_samples for split in splits)])
    records, whole = np.zeros(shard_starts[-1], RECORD), np.zeros(len(jobs), bool)
    for number, part in enumerate(map_ordered(read_shard, jobs, processes)):
        records[shard_starts[number] : shard_starts[number + 1]] = part.records
        whole[number] = part.whole
        on_done(len(part.records), part.bytes_read, len(records))
    return Samples(
        records=records,
        shards=jobs,
        shard_starts=shard_starts,
        whole=whole,
        splits=[split.name for split in splits],
        split_starts=split_starts,
        classes=[split.manifest.classes for split in splits],
    )
