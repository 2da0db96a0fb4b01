"""The file that FFCV reads: header, fields, a row of metadata a sample, pages of payloads, table of their places.

ffcv's own writer waits for ever when one of its workers dies, gives a half-written file a valid header, and holds some
500 bytes of Python objects a sample. So its version 2 is laid out here, in this process alone, with 68 bytes a sample.
The same pictures give the same bytes.
"""

from __future__ import annotations

import hashlib
from typing import IO, NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from data_prep.index_records import INDEX
from data_prep.workers import Progress

MODES = {"jpg": 0, "raw": 1}  # as ffcv numbers them
VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "u1", (16,)), ("arguments", "u1", (1024,))])
FIELDS = (("image", 2), ("label", 1))  # names, and ffcv's numbers of RGBImageField and IntField
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA = np.dtype([("f0", IMAGE), ("f1", "<i8")], align=True)
TABLE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
# ffcv's smallest page, and its default. Of the latter a file of a few samples would be nearly all padding.
SMALL_PAGE, PAGE = 2 << 20, 8 << 20
FEW_SAMPLES = 1000
MAX_PAGE = 1 << 31  # ffcv holds its size in 32 bits
MAX_SIDE = 65535  # and a side in 16
_BUFFER_BYTES = 4 << 20
_DISK = "the disk or its memory is at fault"


class Stored(NamedTuple):
    """One sample's picture as it lies in the file."""

    mode: str  # "jpg" or "raw"
    width: int  # pixels
    height: int
    payload: bytes  # a JPEG, or height x width x 3 bytes
    crc32: int  # of the payload


class BetonFile:
    """Takes the samples in order; `finish` writes the tables, and the header last: cut short it is no .beton.

    A sample must lie in one page of the file. Pages double where a sample needs it, and what lay in one page then lies
    in one page still: so nothing must be known of the samples that are to come.
    """

    def __init__(self, file: IO[bytes], name: str, labels: np.ndarray) -> None:
        self.file = file
        self.name = name
        self.page_size = SMALL_PAGE if len(labels) < FEW_SAMPLES else PAGE
        self.metadata = np.zeros(len(labels), METADATA)
        self.metadata["f1"] = labels
        self.index = np.zeros(len(labels), INDEX)
        self.index["label"] = labels
        self.added = 0
        head = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + self.metadata.nbytes
        self.position = _next_page(head, self.page_size)
        self.file.seek(self.position)

    def add(self, stored: Stored) -> None:
        """Errors: ValueError where ffcv's format has no room for the picture."""
        size = len(stored.payload)
        assert size > 0
        if size > MAX_PAGE or max(stored.width, stored.height) > MAX_SIDE:
            raise ValueError(
                f"{self.name}: sample {self.added} has {stored.width}x{stored.height} pixels, {size:,} bytes: ffcv's "
                f"format takes {MAX_SIDE} pixels a side and {MAX_PAGE:,} bytes: reduce it with --max-resolution"
            )
        while self.page_size < size:
            self.page_size *= 2
        if self.position // self.page_size != (self.position + size - 1) // self.page_size:
            self.position = _next_page(self.position, self.page_size)
            self.file.seek(self.position)
        self.file.write(stored.payload)
        image = MODES[stored.mode], stored.width, stored.height, self.position
        self.metadata["f0"][self.added] = image
        record = self.index[self.added]
        record["offset"], record["size"], record["crc32"] = self.position, size, stored.crc32
        self.position += size
        self.added += 1

    def finish(self) -> None:
        assert self.added == len(self.index), "samples are missing"
        table = np.zeros(len(self.index), TABLE)
        table["sample_id"] = np.arange(len(table))
        table["ptr"], table["size"] = self.index["offset"], self.index["size"]
        header = np.zeros((), HEADER)
        header["version"], header["num_fields"], header["page_size"] = VERSION, len(FIELDS), self.page_size
        header["num_samples"] = len(self.index)
        header["alloc_table_ptr"] = end = _next_page(self.position, self.page_size)
        self.tables = [
            (0, header.reshape(1)),
            (HEADER.itemsize, _fields()),
            (HEADER.itemsize + len(FIELDS) * FIELD.itemsize, self.metadata),
            (end, table),
        ]
        for start, values in reversed(self.tables):
            self.file.seek(start)
            self.file.write(values.tobytes())
            self.file.flush()

    def read_back(self, on_done: Progress) -> str:
        """The file's sha256, after reading it once more and comparing each sample with what was to be written.

        Errors: ValueError naming the sample.
        """
        file = _HashingReader(self.file)
        *head, (end, table) = self.tables
        if any(file.read(start, values.nbytes) != values.tobytes() for start, values in head):
            raise ValueError(f"{self.name}: the tables are not what was written: {_DISK}")
        for sample_id, record in enumerate(self.index):
            offset, size, _, crc = record.tolist()
            if crc32(file.read(offset, size)) != crc:
                raise ValueError(f"{self.name}: sample {sample_id} is not what was written: {_DISK}")
            on_done(1, size, 2 * len(self.index))
        if file.read(end, table.nbytes) != table.tobytes() or self.file.read(1):
            raise ValueError(f"{self.name}: the table is not what was written: {_DISK}")
        return file.sha256.hexdigest()


class _HashingReader:
    """Reads a file from start to end, hashing what is passed over too."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.file.seek(0)
        self.position = 0
        self.sha256 = hashlib.sha256()

    def read(self, start: int, size: int) -> bytes:
        while self.position < start:
            self._take(min(start - self.position, _BUFFER_BYTES))
        return self._take(size)

    def _take(self, size: int) -> bytes:
        data = self.file.read(size)
        self.position += size
        self.sha256.update(data)
        return data


def _next_page(position: int, page_size: int) -> int:
    return -(-position // page_size) * page_size


def _fields() -> np.ndarray:
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (name, type_id) in zip(fields, FIELDS, strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return fields
