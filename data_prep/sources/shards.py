"""The shards of a manifest as a source: to make other shards of them, smaller ones for instance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.foreign import samples_in
from data_prep.index_records import index_records
from data_prep.manifest import IndexEntry, Manifest, check_index, read_manifest
from data_prep.sources import Listing, ListingBuilder, Sample
from data_prep.tar_shards import read_index, read_pictures


@dataclass(frozen=True)
class ShardSource:
    """Pictures of WebDataset tars, this project's or indexed ones, in the manifest's order."""

    path: Path

    def describe(self) -> dict[str, Any]:
        return {"kind": "shards", "samples_sha256": read_manifest(self.path).samples_sha256()}

    def where(self, path: str) -> str:
        return f"{self.path}: {path}"

    def scan(self) -> Listing:
        """Errors: ValueError or FileNotFoundError naming the shard that is not as its index says."""
        manifest = self._manifest()
        listing = ListingBuilder(manifest.classes, manifest.class_names)
        for number, shard in enumerate(manifest.shards):
            records = self._records(manifest, number)
            tar, label = manifest.folder / shard.name, manifest.source.get("label", "cls")
            for record, sample in zip(records.tolist(), samples_in(tar, label), strict=True):
                offset, size, label_id, crc = record
                if (sample.picture.offset, sample.picture.size) != (offset, size):
                    raise ValueError(
                        f"{tar}: {sample.key} is not where its index says: run `python -m data_prep verify`"
                    )
                # The key is a path with its folder's name already in it.
                listing.add(f"{sample.key}.jpg", label_id, (number, offset, size, crc))
        return listing.listing()

    def read(self, samples: Sequence[Sample]) -> Iterator[bytes]:
        manifest = read_manifest(self.path)
        for sample in samples:
            number, offset, size, crc = sample.place
            entry = IndexEntry(offset, size, sample.label, crc)
            yield from read_pictures(manifest.folder / manifest.shards[number].name, [entry])

    def stamp(self, sample: Sample) -> str:
        # Read against it, the CRC tells a changed picture by itself.
        return str(sample.place)

    def _manifest(self) -> Manifest:
        manifest = read_manifest(self.path)
        if not manifest.shards:
            raise ValueError(f"{self.path} has no shards, only a .beton: name the source that it was made from")
        return manifest

    def _records(self, manifest: Manifest, number: int) -> np.ndarray:
        shard = manifest.shards[number]
        read_index(manifest.folder, shard)
        path = manifest.folder / shard.index_name
        data = path.read_bytes()
        if not check_index(data, path)[1]:
            raise ValueError(f"{path} holds no CRCs: run `python -m data_prep index --hash` first")
        return index_records(data)
