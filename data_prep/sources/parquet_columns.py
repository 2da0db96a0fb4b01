"""What a Parquet file of pictures says without the pictures: labels, names and row groups."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple


class Columns(NamedTuple):
    """A file's rows without their pictures."""

    names: tuple[str, ...] | None  # of the labels, where the file has Hugging Face's ClassLabel
    text: bool  # labels are names
    labels: list[Any]  # int or str
    paths: list[str | None]
    groups: list[int]  # rows of each row group

    def places(self) -> Iterator[tuple[int, int]]:
        """(row group, row in it) of each row."""
        for group, size in enumerate(self.groups):
            for row in range(size):
                yield group, row


def read_columns(parquet: Any, file: str) -> Columns:
    """Reads the columns `label` and `image.path` of a pyarrow.parquet.ParquetFile, a row group at a time.

    Errors: ValueError naming `file`, and the row that has no label; pyarrow's own.
    """
    import pyarrow.compute

    schema = parquet.schema_arrow
    with_paths = picture_leaf(schema, file) != "image" and schema.field("image").type.get_field_index("path") >= 0
    label_type, text = _label_type(schema, file)
    labels: list[Any] = []
    paths: list[str | None] = []
    groups: list[int] = []
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, columns=["label", "image.path"] if with_paths else ["label"])
        found = table.column("label").cast(label_type).to_pylist()
        if None in found:
            row = len(labels) + found.index(None)
            raise ValueError(f"{file}, row {row}: it has no label: name files of a split with labels")
        labels += found
        groups.append(len(found))
        if with_paths:
            paths += pyarrow.compute.struct_field(table.column("image"), "path").to_pylist()
    return Columns(_label_names(schema, file), text, labels, paths if with_paths else [None] * len(labels), groups)


def picture_leaf(schema: Any, file: str) -> str:
    """The column of the pictures' bytes: "image.bytes", or "image" where that is plain binary.

    Errors: ValueError where there is none.
    """
    import pyarrow.types as types

    for name in ("image", "label"):
        if name not in schema.names:
            held = ", ".join(schema.names)
            raise ValueError(
                f"{file} has no column {name!r} (its columns: {held}): name files with `image` and `label`"
            )
    image = schema.field("image").type
    if _is_binary(image):
        return "image"
    if types.is_struct(image) and image.get_field_index("bytes") >= 0 and _is_binary(image.field("bytes").type):
        return "image.bytes"
    raise ValueError(f"{file}: column `image` is {image}: it must be binary, or struct<bytes: binary, path: string>")


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _label_type(schema: Any, file: str) -> tuple[Any, bool]:
    """What labels are cast to, and whether that is text."""
    import pyarrow

    kind = schema.field("label").type
    held = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if pyarrow.types.is_integer(held):
        return pyarrow.int64(), False
    if pyarrow.types.is_string(held) or pyarrow.types.is_large_string(held):
        return pyarrow.large_string(), True
    raise ValueError(f"{file}: column `label` is {kind}: it must hold integers or names")


def _label_names(schema: Any, file: str) -> tuple[str, ...] | None:
    """The names that Hugging Face's `datasets` keeps beside the schema."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        names = json.loads(text)["info"]["features"]["label"].get("names")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: its Hugging Face metadata says nothing of `label` ({error!r}): give it") from error
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: the class names in its Hugging Face metadata are no list of texts: mend them")
    return tuple(names)
