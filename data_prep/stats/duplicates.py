"""Pictures with the same bytes, in one split or in several.

Only pictures of one size and one CRC-32 can be equal, and both stand in the indexes; those few alone are read and
compared by half of their sha256.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_prep.stats.records import DigestJob, KeysJob, ShardJob, read_digests, read_keys
from data_prep.workers import map_ordered

MAX_COPIES = 10  # named of one group; a plain white picture may occur by the thousand


@dataclass(frozen=True)
class Samples:
    """The pictures of all splits, one after another."""

    records: np.ndarray  # (n,) of records.RECORD
    shards: Sequence[ShardJob]
    shard_starts: np.ndarray  # (shards + 1,)
    whole: np.ndarray  # (shards,) whether the shard's pictures have their digests already
    splits: Sequence[str]  # names
    split_starts: np.ndarray  # (splits + 1,)
    classes: Sequence[Sequence[str]]  # of each split

    def split_of(self, samples: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.split_starts, samples, "right") - 1

    def shard_of(self, samples: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.shard_starts, samples, "right") - 1


@dataclass(frozen=True)
class Copy:
    """One of several equal pictures."""

    split: str
    shard: str
    key: str
    sample_id: int  # in its split
    class_name: str


@dataclass(frozen=True)
class Group:
    """Equal pictures."""

    size: int  # bytes of each
    pictures: int
    copies: tuple[Copy, ...]  # the first MAX_COPIES


@dataclass(frozen=True)
class Count:
    """Equal pictures in one place."""

    place: str  # a split, or two of them: then the groups with a picture in each
    groups: int
    pictures: tuple[int, ...]  # of these groups, in each split of the place
    groups_of_two_classes: int


@dataclass(frozen=True)
class Duplicates:
    groups: int
    pictures: int  # in groups; all but one of each group could be left out
    groups_of_two_classes: int  # or more
    compared: int  # pictures of the same size and CRC as another, compared by sha256
    collisions: int  # of these, pictures that are equal to no other
    counts: tuple[Count, ...]
    two_classes: tuple[Group, ...]  # named in full, up to the option's number
    one_class: tuple[Group, ...]


class _Groups(NamedTuple):
    members: np.ndarray  # samples, group by group, each in order
    starts: np.ndarray  # of each group in members, and the end
    mixed: np.ndarray  # of each group, whether its pictures are of two classes or more


def find_duplicates(samples: Samples, listed: int, processes: int, on_read: Callable[[int], None]) -> Duplicates:
    """`listed`: groups to name of each kind. on_read hears of bytes read. Errors: as read_digests."""
    records = samples.records
    candidates = same_size_and_crc(records)
    digests = _digests(samples, candidates, processes, on_read)
    groups = _grouped(samples, candidates, digests)
    # First those in several splits, which spoil an evaluation.
    splits = samples.split_of(groups.members)
    order = np.argsort(splits[groups.starts[:-1]] == splits[groups.starts[1:] - 1], kind="stable")
    mixed, plain = order[groups.mixed[order]], order[~groups.mixed[order]]
    named = _named(samples, groups, np.concatenate([mixed[:listed], plain[:listed]]), processes)
    return Duplicates(
        groups=len(groups.mixed),
        pictures=len(groups.members),
        groups_of_two_classes=len(mixed),
        compared=len(candidates),
        collisions=len(candidates) - len(groups.members),
        counts=_counts(samples, groups),
        two_classes=tuple(named[: len(mixed[:listed])]),
        one_class=tuple(named[len(mixed[:listed]) :]),
    )


def same_size_and_crc(records: np.ndarray) -> np.ndarray:
    """The samples that share size and CRC-32 with another, sorted."""
    key = records["size"].astype(np.uint64) << np.uint64(32) | records["crc32"]
    order = np.argsort(key)
    key = key[order]
    equal = key[1:] == key[:-1]
    return np.sort(order[np.concatenate([equal, [False]]) | np.concatenate([[False], equal])])


def _digests(samples: Samples, candidates: np.ndarray, processes: int, on_read: Callable[[int], None]) -> np.ndarray:
    """(candidates, 2)"""
    digests = samples.records["digest"][candidates]
    shards = samples.shard_of(candidates)
    places = [np.flatnonzero(shards == shard) for shard in np.unique(shards) if not samples.whole[shard]]
    jobs = [DigestJob(samples.shards[shards[place[0]]], samples.records[candidates[place]]) for place in places]
    for place, job, found in zip(places, jobs, map_ordered(read_digests, jobs, processes), strict=True):
        digests[place] = found
        on_read(int(job.records["size"].sum(dtype=np.int64)))
    return digests


def _grouped(samples: Samples, candidates: np.ndarray, digests: np.ndarray) -> _Groups:
    """Groups of equal digests, in the order of their first samples."""
    order = np.lexsort((candidates, digests[:, 1], digests[:, 0]))
    digests, candidates = digests[order], candidates[order]
    is_first = np.concatenate([[True], (digests[1:] != digests[:-1]).any(1)])[: len(candidates)]
    group = np.cumsum(is_first) - 1
    first = candidates[is_first][group]  # sample of its group
    several = np.bincount(group, minlength=1)[group] > 1
    first, members = first[several], candidates[several]
    order = np.lexsort((members, first))
    first, members = first[order], members[order]
    starts = np.flatnonzero(np.concatenate([[True], first[1:] != first[:-1]])[: len(first)])
    mixed = np.zeros(len(starts), bool)
    if len(starts):
        classes = _class_numbers(samples, members)
        mixed = np.minimum.reduceat(classes, starts) != np.maximum.reduceat(classes, starts)
    return _Groups(members, np.append(starts, len(members)), mixed)


def _class_numbers(samples: Samples, members: np.ndarray) -> np.ndarray:
    """One number for each class name, whichever split it is of."""
    numbers: dict[str, int] = {}
    tables = [np.array([numbers.setdefault(name, len(numbers)) for name in names]) for names in samples.classes]
    labels, splits = samples.records["label"][members], samples.split_of(members)
    found = np.zeros(len(members), np.int64)
    for split, table in enumerate(tables):
        found[splits == split] = table[labels[splits == split]]
    return found


def _counts(samples: Samples, groups: _Groups) -> tuple[Count, ...]:
    """Of each split, then of each two."""
    held = np.zeros((len(groups.mixed), len(samples.splits)), np.int64)
    np.add.at(held, (np.repeat(np.arange(len(held)), np.diff(groups.starts)), samples.split_of(groups.members)), 1)
    counts = []
    for split, name in enumerate(samples.splits):
        inside = held[:, split] > 1
        counts.append(_count(f"within {name}", inside, held[:, [split]], groups.mixed))
    for one, first in enumerate(samples.splits):
        for other in range(one + 1, len(samples.splits)):
            both = (held[:, one] > 0) & (held[:, other] > 0)
            counts.append(_count(f"{first} and {samples.splits[other]}", both, held[:, [one, other]], groups.mixed))
    return tuple(counts)


def _count(place: str, chosen: np.ndarray, held: np.ndarray, mixed: np.ndarray) -> Count:
    return Count(place, int(chosen.sum()), tuple(held[chosen].sum(0).tolist()), int((chosen & mixed).sum()))


def _named(samples: Samples, groups: _Groups, chosen: np.ndarray, processes: int) -> list[Group]:
    """The chosen groups with the keys of their pictures."""
    spans = [(int(groups.starts[group]), int(groups.starts[group + 1])) for group in chosen]
    shown = [groups.members[start : min(end, start + MAX_COPIES)] for start, end in spans]
    wanted = np.unique(np.concatenate([groups.members[:0], *shown]))
    keys: dict[int, str] = {}
    shards = samples.shard_of(wanted)
    parts = [(shard, wanted[shards == shard]) for shard in np.unique(shards)]
    jobs = [KeysJob(samples.shards[n], tuple(samples.records["offset"][part].tolist())) for n, part in parts]
    for (_, part), found in zip(parts, map_ordered(read_keys, jobs, processes), strict=True):
        keys |= zip(part.tolist(), found, strict=True)
    return [
        Group(int(samples.records["size"][members[0]]), end - start, tuple(_copy(samples, s, keys[s]) for s in members))
        for (start, end), members in zip(spans, (part.tolist() for part in shown), strict=True)
    ]


def _copy(samples: Samples, sample: int, key: str) -> Copy:
    split = int(samples.split_of(np.array(sample)))
    shard = samples.shards[int(samples.shard_of(np.array(sample)))]
    name = samples.classes[split][int(samples.records["label"][sample])]
    return Copy(samples.splits[split], shard.record.name, key, sample - int(samples.split_starts[split]), name)
