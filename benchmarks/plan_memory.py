"""Peak memory of a data set's plan and manifest, in a process of its own: a peak never falls again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from data_prep.manifest import Manifest, Note, ShardRecord, parse_manifest
from data_prep.plan import plan_shards, shard_name
from data_prep.sources import Listing, ListingBuilder

CLASSES = 1000
REPAIRED = 20_000  # about as many as ImageNet has grey pictures


def planned_imagenet(samples: int) -> int:
    """Megabytes at the peak, of a listing of synthetic entries, its plan, and a manifest written and read back."""
    command = (sys.executable, "-m", "benchmarks.plan_memory", str(samples))
    done = subprocess.run(
        command, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def _listing(samples: int) -> Listing:
    builder = ListingBuilder([f"n{label:08d}" for label in range(CLASSES)])
    for i in range(samples):
        label = i * CLASSES // samples
        builder.add(f"n{label:08d}/n{label:08d}_{i}.JPEG", label)
    return builder.listing()


def _peak_megabytes(samples: int) -> int:
    listing = _listing(samples)
    plan = plan_shards(len(listing), 1000, seed=0)
    digest = "0" * 64
    manifest = Manifest(
        split="train",
        classes=listing.classes,
        class_counts=tuple(_counts(listing)),
        shards=tuple(ShardRecord(shard_name("train", i), len(ids), 1, digest, digest) for i, ids in enumerate(plan)),
        source={"listing_sha256": listing.sha256()},
        options={},
        repaired=tuple(Note(listing.keys[i], listing.paths[i], "grey") for i in range(min(REPAIRED, samples))),
    )
    assert parse_manifest(manifest.to_json().encode(), "manifest", Path()) == manifest
    # A process inherits ru_maxrss of the one that started it; this peak is its own.
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(peak.split()[1]) // 1024


def _counts(listing: Listing) -> list[int]:
    counts = [0] * CLASSES
    for label in listing.labels:
        counts[label] += 1
    return counts


if __name__ == "__main__":
    print(_peak_megabytes(int(sys.argv[1])))
