"""An FFCV .beton as it is read: its tables are checked, and its pictures are read by offset, as a tar's are.

ffcv itself has no part in it. Its Loader takes a custom order only in name, draws crops from an unseeded generator,
shrinks with another filter than the tars' reader, and blocks when its thread fails; its decoder passes 482 of 600
single-bit flips as pictures; importing it takes 3 s and starts threads that a fork does not survive. The CRCs stand in
the index beside the file, and a picture comes out the same as from a tar.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.manifest import Manifest
from pipeline.data.decode import MAX_PIXELS
from pipeline.data.index import IndexFile, SampleIndex
from pipeline.data.source import Form, OpenFile

# ffcv's format, version 2: header, fields, a row of metadata a sample, pages of payloads, table of their places.
_VERSION = 2
_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
_FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
_FIELDS = [(2, b"image"), (1, b"label")]  # RGBImageField and IntField
_PICTURE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_ROW = np.dtype([("picture", _PICTURE), ("label", "<i8")], align=True)
_PLACE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_JPG, _RAW = 0, 1  # modes of a picture


class _Tables(NamedTuple):
    """Mapped, as the index is: of a million samples they are 56 MB."""

    head: bytes  # header and fields
    rows: np.ndarray  # _ROW (n,)
    places: np.ndarray  # _PLACE (n,)


class BetonSource:
    """One split's .beton. Safe to fork: the file is read by offset."""

    fetches = False

    def __init__(self, manifest: Manifest) -> None:
        """Errors: ValueError, FileNotFoundError where the file is not what the manifest and the index say."""
        self._mend = f"write it again with `python -m data_prep beton {manifest.path}`"
        record = manifest.beton
        if record is None:
            raise FileNotFoundError(f"{manifest.path} has no .beton, but data.format is ffcv: {self._mend}")
        self.path = manifest.folder / record.name
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is missing: {self._mend}")
        if (size := self.path.stat().st_size) != record.bytes:
            raise ValueError(f"{self.path} has {size} bytes, {manifest.path} says {record.bytes}: {self._mend}")
        index = IndexFile(manifest.folder / record.index_name, record.samples, record.index_sha256, self._mend)
        self.index = SampleIndex([index])
        tables = self._tables(manifest.num_samples, size)
        self._check_pictures(tables, size)
        self._check_index(tables, index.path)
        self._check_digest(tables, record.tables_sha256)
        self._check_shards(manifest)
        self._pictures = tables.rows["picture"]
        self._file = OpenFile(os.open(self.path, os.O_RDONLY))

    def file(self, number: int, wait: bool = True) -> OpenFile:
        return self._file

    def where(self, sample_id: int) -> str:
        return f"sample {sample_id} of {self.path}"

    def form(self, sample_ids: np.ndarray) -> Form:
        pictures = self._pictures[sample_ids]
        sizes = np.stack((pictures["width"], pictures["height"]), 1).astype(np.uint32)
        return Form(sizes, pictures["mode"] == _RAW)

    def mend(self, number: int) -> str:
        return self._mend

    def check_sizes(self) -> None:
        """Done when it was opened."""

    def close(self) -> None:
        """Nothing runs for it."""

    def expect(self, files: np.ndarray, keep: bool) -> None:
        """There is one file alone."""

    def _tables(self, num_samples: int, length: int) -> _Tables:
        """Errors: ValueError where the header is not that of a .beton of so many pictures and labels."""
        first_row = _HEADER.itemsize + len(_FIELDS) * _FIELD.itemsize
        with open(self.path, "rb") as file:
            head = file.read(first_row)
        if len(head) < first_row:
            raise ValueError(f"{self.path} is not a readable .beton ({length} bytes): {self._mend}")
        header = np.frombuffer(head, _HEADER, 1)[0]
        if header["version"] != _VERSION or header["num_fields"] != len(_FIELDS):
            raise ValueError(
                f"{self.path} is not a readable .beton (version {header['version']}, {header['num_fields']} fields): "
                f"{self._mend}"
            )
        fields = np.frombuffer(head, _FIELD, len(_FIELDS), _HEADER.itemsize)
        if [(int(field["type_id"]), field["name"]) for field in fields] != _FIELDS:
            raise ValueError(f"{self.path} has the fields {fields['name'].tolist()}, not image and label: {self._mend}")
        if header["num_samples"] != num_samples:
            raise ValueError(
                f"{self.path} holds {header['num_samples']} samples, the manifest says {num_samples}: {self._mend}"
            )
        table = int(header["alloc_table_ptr"])
        if first_row + num_samples * _ROW.itemsize > length or table + num_samples * _PLACE.itemsize != length:
            raise ValueError(f"{self.path} has its table of places elsewhere than at its end: {self._mend}")
        rows = np.memmap(self.path, _ROW, "r", first_row, (num_samples,))
        return _Tables(head, rows, np.memmap(self.path, _PLACE, "r", table, (num_samples,)))

    def _check_pictures(self, tables: _Tables, length: int) -> None:
        """Errors: ValueError for a picture that does not lie inside the file, or has an impossible form."""
        pictures, places = tables.rows["picture"], tables.places
        pixels = pictures["height"].astype(np.int64) * pictures["width"]
        wrong = (
            (places["sample_id"] != np.arange(len(places)))
            | (places["ptr"] != pictures["data_ptr"])
            | (places["size"] > length)  # first, since the sum may wrap around
            | (places["ptr"] + places["size"] > length)
            | ~np.isin(pictures["mode"], (_JPG, _RAW))
            | (pixels == 0)
            | (pixels > MAX_PIXELS)
            | ((pictures["mode"] == _RAW) & (places["size"] != pixels * 3))
        )
        if wrong.any():
            raise ValueError(f"{self.path}: sample {int(wrong.argmax())} has damaged metadata: {self._mend}")

    def _check_index(self, tables: _Tables, path: Path) -> None:
        """Errors: ValueError where the tables say otherwise than the index, whose hash the manifest holds."""
        records = self.index.of_file(0)
        wrong = (
            (records["offset"] != tables.places["ptr"])
            | (records["size"] != tables.places["size"])
            | (records["label"] != tables.rows["label"])
        )
        if wrong.any():
            raise ValueError(
                f"{self.path}: sample {int(wrong.argmax())} has other metadata than in {path}: {self._mend}"
            )

    def _check_digest(self, tables: _Tables, sha256: str | None) -> None:
        """Errors: ValueError where the tables are not those that were written, in whatever way."""
        digest = hashlib.sha256(tables.head)
        for values in (tables.rows, tables.places):
            digest.update(values.data)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ValueError(f"{self.path} has other tables than those that were written: {self._mend}")

    def _check_shards(self, manifest: Manifest) -> None:
        """Errors: ValueError where the shards' indexes, if they are here too, tell of other samples."""
        files = [
            IndexFile(manifest.folder / s.index_name, s.samples, s.index_sha256, self._mend) for s in manifest.shards
        ]
        if not files or not all(file.path.is_file() for file in files):
            return
        mine, theirs = self.index.labels(), SampleIndex(files).labels()
        if len(mine) != len(theirs) or (mine != theirs).any():
            raise ValueError(
                f"{self.path} holds other pictures than the shards of {manifest.path}, at the latest from sample "
                f"{int((mine[: len(theirs)] != theirs[: len(mine)]).argmax())} on: {self._mend}"
            )
