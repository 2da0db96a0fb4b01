"""Parquet files with an `image` and a `label` column, as the Hugging Face hub ships data sets.

A picture of a row group can only be reached through those before it. So the listing keeps the order of the rows and
tells where the groups end; shards are then planned from whole groups as far as can be.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from data_prep.sources import Listing, ListingBuilder, Sample
from data_prep.sources.parquet_columns import Columns, picture_leaf, read_columns
from data_prep.sources.reading import FileStamps, read_ahead
from data_prep.storage import file_system, local_path, named_errors, open_file, open_folder

SPLIT_NAMES = frozenset({"train", "validation", "val", "test"})
# A row group of 1,000 ImageNet pictures has 110 MB: it passes through in pieces of this many rows and bytes.
_ROWS_AT_ONCE = 32
_LOCAL_BUFFER_BYTES = 1 << 20
_REMOTE_BUFFER_BYTES = 8 << 20
# The hub's ImageNet calls n01440764_10026.JPEG of ImageNet's own archive n01440764_10026_n01440764.JPEG.
_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Parquet:
    """Rows in the order of the files. Labels are the files' own."""

    files: tuple[str, ...]  # paths or URLs
    classes: tuple[str, ...] | None = None  # in the order of labels; None: what the files say, else the numbers
    _stamps: FileStamps = field(default_factory=FileStamps, init=False, compare=False, repr=False)

    @property
    def _name(self) -> str:
        return self.files[0] if len(self.files) == 1 else self.files[0].rpartition("/")[0] or "."

    def describe(self) -> dict[str, Any]:
        return {"kind": "parquet", "name": "/".join(self._name.split("/")[-2:]), "files": len(self.files)}

    def where(self, path: str) -> str:
        return f"{self._name}: {path}"

    def scan(self) -> Listing:
        """Lists the rows; of the pictures it reads nothing.

        Errors: ValueError or OSError naming the file, and the row, where a file is no such Parquet or differs from the
        others, a label is missing or has no name, or a class has no picture.
        """
        contents = list(read_ahead(_content, self.files))
        for file, content in zip(self.files, contents, strict=True):
            if (content.names, content.text) != (contents[0].names, contents[0].text):
                raise ValueError(
                    f"{file} and {self.files[0]} differ in class names or in the type of labels: name the files of one "
                    "split of one data set"
                )
        classes = self._classes(contents)
        labels = [_labels(content, classes, file) for file, content in zip(self.files, contents, strict=True)]
        self._refuse_empty_classes(np.bincount(np.concatenate(labels), minlength=len(classes)), classes)
        readable = contents[0].names or () if self.classes is not None else ()
        listing = ListingBuilder(classes, readable)
        seen: set[str] = set()
        for number, content in enumerate(contents):
            rows = zip(content.places(), content.paths, labels[number].tolist(), strict=True)
            for row, (place, given, label) in enumerate(rows):
                path = _path(classes[label], given)
                if path is None or path in seen:  # some writers give all pictures one name
                    path = f"{classes[label]}/{PurePosixPath(self.files[number]).stem}-{row:08d}.jpg"
                seen.add(path)
                listing.add(path, label, (number, *place))
        return listing.listing(runs=[size for content in contents for size in content.groups if size])

    def read(self, samples: Sequence[Sample]) -> Iterator[bytes]:
        """As Source.read; each row group is read once. Held: what is asked for of the groups begun, and 32 rows."""
        wanted: dict[tuple[int, ...], dict[int, list[int]]] = {}
        for index, sample in enumerate(samples):
            wanted.setdefault(sample.place[:2], {}).setdefault(sample.place[2], []).append(index)
        ready: dict[int, bytes] = {}
        for index, sample in enumerate(samples):
            if index not in ready:
                rows = wanted[sample.place[:2]]
                for row, data in _pictures(self.files[sample.place[0]], sample.place[1], set(rows)):
                    ready.update((asked, data) for asked in rows[row])
            yield ready.pop(index)

    def stamp(self, sample: Sample) -> str:
        number, group, row = sample.place
        return f"{self._stamps.of(self.files[number])} {group} {row}"

    def _classes(self, contents: list[Columns]) -> tuple[str, ...]:
        names = contents[0].names
        rows = sum(len(content.labels) for content in contents)
        if not rows:
            raise ValueError(f"{self._name} has no rows: name Parquet files that hold pictures")
        if self.classes is not None:
            if names is not None and len(names) != len(self.classes):
                raise ValueError(f"--classes names {len(self.classes):,} classes, {self.files[0]} has {len(names):,}")
            return self.classes
        if names is not None:
            return names
        if contents[0].text:
            return tuple(sorted({name for content in contents for name in content.labels}))
        highest = max(max(content.labels, default=-1) for content in contents)
        if highest >= rows:
            raise ValueError(f"{self._name} has a label {highest:,} but {rows:,} rows: labels must be 0 to n-1")
        return tuple(str(label) for label in range(highest + 1))

    def _refuse_empty_classes(self, counts: np.ndarray, classes: tuple[str, ...]) -> None:
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            raise ValueError(
                f"{self._name}: {len(empty):,} of {len(classes):,} classes have no picture, the first is "
                f"{classes[empty[0]]!r}: name all files of the split"
            )


def find_parquet(url: str) -> tuple[str, ...]:
    """The Parquet files that a folder, a file or a pattern (`train-*.parquet`) names, sorted; none: an empty tuple.

    Errors: ValueError where they are several splits, as in the folder that the hub gives.
    """
    path = local_path(url)
    folder, pattern = open_file(url)
    if not pattern.endswith(".parquet") or (path is not None and path.is_dir()):
        folder, pattern = open_folder(url.rstrip("/")), "*.parquet"
    names = [pattern] if folder.size(pattern) is not None else folder.names(pattern)
    names = [name for name in names if not name.startswith(".")]
    splits = sorted({name.split("-")[0] for name in names} & SPLIT_NAMES)
    if len(splits) > 1:
        raise ValueError(
            f"source {url} holds several splits ({', '.join(splits)}): name one of them, as in "
            f"--source '{folder.where(f'{splits[0]}-*.parquet')}'"
        )
    return tuple(folder.where(name) for name in names)


def _path(name: str, given: str | None) -> str | None:
    """Sample.path of a picture of class `name` that the file calls `given`; None where that is no name."""
    given = (given or "").rpartition("/")[2]
    if given in ("", ".", ".."):
        return None
    stem, suffix = os.path.splitext(given)
    if stem.endswith(f"_{name}") and _WORDNET_ID.fullmatch(name):
        given = stem.removesuffix(f"_{name}") + suffix
    return f"{name}/{given}"


def _labels(content: Columns, classes: tuple[str, ...], file: str) -> np.ndarray:
    """The rows' labels as indices into `classes`, int64 (rows,). Errors: ValueError naming the row."""
    if content.text:
        numbers = {name: label for label, name in enumerate(classes)}
        labels = [numbers.get(label, -1) for label in content.labels]
    else:
        labels = content.labels
    for row, label in enumerate(labels):
        if not 0 <= label < len(classes):
            given = content.labels[row]
            mend = "name files of a split with labels" if given == -1 else f"{len(classes):,} classes are known"
            raise ValueError(f"{file}, row {row}: its label is {given!r}: {mend}")
    return np.array(labels, np.int64)


def _content(file: str) -> Columns:
    with _opened(file, buffer_bytes=0) as parquet:
        return read_columns(parquet, file)


def _pictures(file: str, group: int, rows: set[int]) -> Iterator[tuple[int, bytes]]:
    """(row in the group, bytes) of the rows asked for; the group is read up to the last of them."""
    first, left = 0, len(rows)
    buffer_bytes = _REMOTE_BUFFER_BYTES if local_path(file) is None else _LOCAL_BUFFER_BYTES
    with _opened(file, buffer_bytes) as parquet:
        import pyarrow.compute

        leaf = picture_leaf(parquet.schema_arrow, file)
        for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[leaf], use_threads=False):
            column = batch.column(0)
            if leaf != "image":
                column = pyarrow.compute.struct_field(column, "bytes")
            for row in sorted(rows.intersection(range(first, first + len(batch)))):
                data = column[row - first].as_py()
                if data is None:
                    raise ValueError(
                        f"{file}, row {row} of row group {group} holds no picture's bytes: embed them, or drop the row"
                    )
                yield row, data
                left -= 1
            if not left:
                return
            first += len(batch)
    raise OSError(f"{file}: row group {group} has {first:,} rows, more were listed: it was changed, run again")


@contextlib.contextmanager
def _opened(file: str, buffer_bytes: int) -> Iterator[Any]:
    """A ParquetFile; a column is read through a buffer of so many bytes, 0: at once, many columns by one request.

    Errors, of reading too: ValueError or OSError naming the file.
    """
    try:
        import pyarrow.parquet  # 0.3 s
    except ImportError as error:
        raise ValueError(f"{file}: Parquet files need pyarrow, which is missing: run `make setup`") from error
    options = {"buffer_size": buffer_bytes, "pre_buffer": not buffer_bytes}
    try:
        if local_path(file) is not None:
            with pyarrow.parquet.ParquetFile(str(local_path(file)), **options) as parquet:
                yield parquet
            return
        with named_errors(file):
            fs, path = file_system(file)
            # Columns lie far apart: what a cache would read ahead is of no use.
            with (
                fs.open(path, "rb", cache_type="none") as source,
                pyarrow.parquet.ParquetFile(source, **options) as parquet,
            ):
                yield parquet
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise OSError(f"{file} cannot be read as Parquet ({error}): is it whole? Fetch it again") from error
