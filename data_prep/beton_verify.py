"""What `verify` finds wrong with a .beton."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_prep.beton_pictures import Form, store
from data_prep.beton_reader import BetonReader, load_ffcv, similar
from data_prep.images import PictureError, decode_rgb
from data_prep.manifest import BetonRecord, Manifest
from data_prep.tar_shards import file_sha256, read_index, read_pictures


def check_beton(manifest: Manifest, quick: bool, shards_are_good: bool) -> Iterator[str]:
    """One line a fault of the manifest's .beton and its index.

    Unless `quick`, each picture is decoded by ffcv's library, and compared with the shards' where there are any and
    they are good. Errors: ValueError where ffcv is missing.
    """
    record = manifest.beton
    assert record is not None
    faults = list(_file_faults(manifest, record))
    yield from faults
    if quick or faults:
        return
    load_ffcv()  # its absence is the user's to mend, not a fault of the file
    try:
        reader = BetonReader(manifest.folder / record.name)
    except ValueError as error:
        yield str(error)
        return
    if not len(reader) == manifest.num_samples == record.samples:
        yield f"{record.name}: {len(reader)} samples, the manifest says {manifest.num_samples}"
        return
    if not manifest.shards:
        yield from _check_alone(manifest, record, reader)
    elif shards_are_good:  # else there is nothing to compare with
        yield from _compare(manifest, record, reader)


def _file_faults(manifest: Manifest, record: BetonRecord) -> Iterator[str]:
    for name, sha256, size in (
        (record.name, record.sha256, record.bytes),
        (record.index_name, record.index_sha256, None),
    ):
        path = manifest.folder / name
        if not path.is_file():
            yield f"{name}: missing"
            continue
        if size is not None and (found := path.stat().st_size) != size:
            yield f"{name}: {found} bytes, the manifest says {size}"
        if file_sha256(path) != sha256:
            yield f"{name}: its sha256 is not the manifest's"


def _check_alone(manifest: Manifest, record: BetonRecord, reader: BetonReader) -> Iterator[str]:
    """Labels are counted, and every picture decodes."""
    labels = np.asarray(reader.labels)
    if labels.min() < 0 or labels.max() >= len(manifest.classes):
        yield f"{record.name}: labels {labels.min()} to {labels.max()}, but there are {len(manifest.classes)} classes"
        return
    counts = np.bincount(labels, minlength=len(manifest.classes)).tolist()
    for name, found, declared in zip(manifest.classes, counts, manifest.class_counts, strict=True):
        if found != declared:
            yield f"class {name!r}: {found} samples in {record.name}, {declared} in the manifest"
    for sample_id in range(len(reader)):
        try:
            reader.picture(sample_id)
        except ValueError as error:
            yield str(error)


def _compare(manifest: Manifest, record: BetonRecord, reader: BetonReader) -> Iterator[str]:
    """The same samples and labels as the shards'."""
    form, sample_id = Form(record.mode, record.max_resolution, record.jpeg_quality), 0
    for shard in manifest.shards:
        entries = read_index(manifest.folder, shard)
        for entry, data in zip(entries, read_pictures(manifest.folder / shard.name, entries), strict=True):
            if (label := int(reader.labels[sample_id])) != entry.label:
                yield f"{record.name}: sample {sample_id} has label {label}, in {shard.name} it has {entry.label}"
            try:
                if not _same_picture(reader, sample_id, data, form):
                    yield f"{record.name}: sample {sample_id} is not the picture of {shard.name}"
            except PictureError as error:
                yield f"{shard.name}: the picture at byte {entry.offset}: {error}"
            except ValueError as error:
                yield str(error)
            sample_id += 1


def _same_picture(reader: BetonReader, sample_id: int, data: bytes, form: Form) -> bool:
    picture = reader.picture(sample_id)
    expected = store(data, sample_id, form)
    if bytes(reader.payload(sample_id)) == expected.payload:
        return True
    # Encoded by another version of Pillow: the bytes may differ, the picture must not.
    if expected.mode == "jpg":
        return similar(picture, decode_rgb(expected.payload))
    shape = (expected.height, expected.width, 3)
    return similar(picture, np.frombuffer(expected.payload, np.uint8).reshape(shape))
