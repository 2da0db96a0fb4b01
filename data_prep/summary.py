"""What a command says at its end: one line for people, or JSON for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.manifest import Manifest, Note


def manifest_summary(
    manifest: Manifest, where: str, seconds: float, restart_markers: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Counts of a split; repairs and skips by reason, pictures by what became of them with `--restart-markers`."""
    size = sum(shard.bytes for shard in manifest.shards) or (manifest.beton.bytes if manifest.beton else 0)
    return {
        "split": manifest.split,
        "manifest": where,
        "images": manifest.num_samples,
        "classes": len(manifest.classes),
        "shards": len(manifest.shards),
        "bytes": size,
        "repaired": _by_reason(manifest.repaired),
        "skipped": _by_reason(manifest.skipped),
        "restart_markers": dict(restart_markers or {}),
        "unverified_shards": sum(shard.sha256 is None for shard in manifest.shards),
        "beton": manifest.beton.name if manifest.beton else None,
        **rates(manifest.num_samples, size, seconds),
    }


def rates(images: int, size: int, seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1),
        "megabytes_per_second": round(size / seconds / 1e6, 1),
    }


def _by_reason(notes: Iterable[Note]) -> dict[str, int]:
    return dict(Counter(note.reason for note in notes).most_common())


def shards_line(summary: dict[str, Any]) -> str:
    """One line on a split's shards."""
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in summary["restart_markers"].items())
    restart = f"; restart markers: {outcomes}" if outcomes else ""
    return (
        f"{summary['split']}: {summary['images']} pictures, {summary['classes']} classes, {summary['shards']} shards, "
        f"{summary['bytes'] / 1e6:.1f} MB, {sum(summary['repaired'].values())} repaired, "
        f"{sum(summary['skipped'].values())} skipped{restart}; {timing(summary)}: {summary['manifest']}"
    )


def timing(summary: dict[str, Any]) -> str:
    return (
        f"{summary['seconds']:.1f} s, {summary['images_per_second']:.0f} images/s, "
        f"{summary['megabytes_per_second']:.0f} MB/s"
    )
