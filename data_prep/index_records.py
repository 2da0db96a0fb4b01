"""A shard's index as a numpy table: of a million samples, tuples would be 200 MB."""

from __future__ import annotations

import zlib

import numpy as np

from data_prep.manifest import FLAG_CRC_KNOWN, INDEX_HEADER, INDEX_MAGIC, INDEX_TRAILER

# One record of manifest.INDEX_RECORD.
INDEX = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("crc32", "<u4")])


def pack_records(records: np.ndarray, crc_known: bool = True) -> bytes:
    """An index file, as manifest.pack_index gives it, of records of dtype INDEX."""
    body = INDEX_HEADER.pack(INDEX_MAGIC, len(records), FLAG_CRC_KNOWN if crc_known else 0) + records.tobytes()
    return body + INDEX_TRAILER.pack(zlib.crc32(body))


def index_records(data: bytes) -> np.ndarray:
    """The records, dtype INDEX, of an index file that manifest.check_index has passed."""
    return np.frombuffer(data[INDEX_HEADER.size : -INDEX_TRAILER.size], INDEX)
