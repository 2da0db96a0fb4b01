"""Damaged .betons: each is refused by name, when opened or when read, and never gives a wrong picture."""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_shards import beton, jpeg

from data_prep.manifest import pack_index, read_manifest, unpack_index, write_manifest


@pytest.fixture(params=["jpg", "raw"])
def any_copy(request, tmp_path) -> Path:
    """A copy to damage, of either form; the manifest's path."""
    manifest = request.getfixturevalue(f"{request.param}_split")
    return Path(shutil.copytree(manifest.parent, tmp_path / "copy")) / manifest.name


class Beton:
    """A .beton's tables, open for damage."""

    def __init__(self, manifest: Path) -> None:
        from ffcv.reader import Reader

        self.path = manifest.parent / "train.beton"
        reader = Reader(str(self.path))
        start = 24 + reader.field_descriptors.nbytes  # after ffcv's HeaderType
        self.samples = np.memmap(self.path, reader.metadata_type, "r+", start, (24,))
        self.pictures, self.labels = (self.samples[name] for name in self.samples.dtype.names)
        self.header = np.memmap(self.path, "<u8", "r+", 0, (3,))
        table = int(self.header[2])
        self.table = np.memmap(self.path, reader.alloc_table.dtype, "r+", table, (24,))
        self.bytes = np.memmap(self.path, np.uint8, "r+")

    def place(self, sample: int) -> int:
        """Row of the allocation table."""
        return int(np.flatnonzero(self.table["sample_id"] == sample)[0])

    def payload(self, sample: int) -> np.ndarray:
        start = int(self.pictures["data_ptr"][sample])
        return self.bytes[start : start + int(self.table["size"][self.place(sample)])]


def half(data: np.ndarray) -> slice:
    return slice(len(data) // 2, None)


BREAKS = {
    "zeros": lambda data: np.zeros_like(data),
    "garbage": lambda data: np.random.RandomState(0).randint(0, 256, len(data), np.uint8),
    "cut": lambda data: np.concatenate((data[: len(data) // 2], np.zeros_like(data[half(data)]))),
    "half garbage": lambda data: np.concatenate((data[: len(data) // 2], BREAKS["garbage"](data[half(data)]))),
    "another picture": lambda data: np.frombuffer(jpeg(99).ljust(len(data), b"\0")[: len(data)], np.uint8),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_picture_in_a_beton_is_refused(any_copy, name):
    payload = Beton(any_copy).payload(7)
    payload[:] = BREAKS[name](payload)
    reader = beton(any_copy)
    reader.batch(np.array([6]), epoch=0)  # a good one first, whose buffer must not come again
    with pytest.raises(ValueError, match=r"sample 7 of .*train\.beton"):
        reader.batch(np.array([6, 7]), epoch=0)


def test_every_single_bit_flip_in_a_beton_is_refused(any_copy):
    """ffcv's decoder takes four of five such JPEGs without a word, and of raw pixels all."""
    tables = Beton(any_copy)
    payload, reader = tables.payload(7), beton(any_copy)
    good = payload.copy()
    rng = np.random.RandomState(0)
    for _ in range(60):
        payload[rng.randint(len(payload))] ^= 1 << rng.randint(8)
        with pytest.raises(ValueError, match=r"sample 7 of .*CRC"):
            reader.batch(np.array([7]), epoch=0)
        payload[:] = good
    reader.batch(np.array([7]), epoch=0)


def test_an_index_that_is_missing_damaged_or_another_s_is_refused(split_copy, raw_split):
    path = split_copy.parent / "train.beton.idx"
    good = path.read_bytes()
    for bad in (good[:-1], good[:40] + bytes([good[40] ^ 1]) + good[41:], (raw_split.parent / path.name).read_bytes()):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"train\.beton\.idx is not the index"):
            beton(split_copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.beton\.idx is missing.*data_prep beton"):
        beton(split_copy)


def test_an_index_that_says_otherwise_than_the_file_is_refused(split_copy):
    """With its true hash in the manifest."""
    manifest = read_manifest(split_copy)
    path = split_copy.parent / "train.beton.idx"
    entries = unpack_index(path.read_bytes(), path)
    for change in ({"offset": entries[4].offset}, {"size": entries[3].size - 1}, {"label": (entries[3].label + 1) % 3}):
        data = pack_index([*entries[:3], entries[3]._replace(**change), *entries[4:]])
        path.write_bytes(data)
        record = dataclasses.replace(manifest.beton, index_sha256=hashlib.sha256(data).hexdigest())
        write_manifest(dataclasses.replace(manifest, beton=record))
        with pytest.raises(ValueError, match="sample 3 has other metadata than"):
            beton(split_copy)


def test_shards_are_not_needed_to_read_a_beton(split_copy):
    expected = beton(split_copy).batch(np.array([1, 2]), None).images
    for path in split_copy.parent.glob("train-*"):
        path.unlink()
    assert beton(split_copy).batch(np.array([1, 2]), None).images.equal(expected)


def test_a_beton_of_other_pictures_than_the_shards_is_refused(split_copy, raw_split):
    """Whole and with its own record, but of another order: sample ids would mean other pictures."""
    manifest = read_manifest(split_copy)
    shards = manifest.shards
    entries = []
    for shard in (shards[1], shards[0]):
        path = manifest.folder / shard.index_name
        entries.append(unpack_index(path.read_bytes(), path))
    assert [e.label for e in entries[0]] != [e.label for e in entries[1]]
    write_manifest(dataclasses.replace(manifest, shards=(shards[1], shards[0], *shards[2:])))
    with pytest.raises(ValueError, match=r"train\.beton holds other pictures than the shards of .*data_prep beton"):
        beton(split_copy)


def swap_pointers(tables: Beton) -> None:
    tables.pictures["data_ptr"][[3, 4]] = tables.pictures["data_ptr"][[4, 3]]


def swap_labels(tables: Beton) -> None:
    first = int(tables.labels[0])
    other = int(np.flatnonzero(tables.labels != first)[0])
    tables.labels[[0, other]] = tables.labels[[other, 0]]


def set_field(name: str, value: int):
    def damage(tables: Beton) -> None:
        tables.pictures[name][3] = value

    return damage


def set_size(value: int):
    def damage(tables: Beton) -> None:
        tables.table["size"][tables.place(3)] = value

    return damage


def set_label(tables: Beton) -> None:
    tables.labels[3] = -1


def set_table(value: int):
    def damage(tables: Beton) -> None:
        tables.header[2] = value

    return damage


METADATA = {
    "pointer outside the file": set_field("data_ptr", 1 << 40),
    "pointer into another sample": set_field("data_ptr", 5000),
    "two pointers swapped": swap_pointers,
    "size over the file's end": set_size(1 << 40),
    "size that wraps around": set_size((1 << 64) - 1),
    "mode unknown": set_field("mode", 7),
    "mode raw, size of a JPEG": set_field("mode", 1),
    "no height": set_field("height", 0),
    "no width": set_field("width", 0),
    "over the pixel limit": lambda t: (set_field("height", 65535)(t), set_field("width", 65535)(t)),
    "two labels swapped": swap_labels,
    "label below 0": set_label,
    "label unknown": lambda t: t.labels.__setitem__(3, 50),
    "table outside the file": set_table(1 << 40),
    "table elsewhere": set_table(64),
    "header of another version": lambda t: t.header.__setitem__(0, 0),
    "more samples than there are": lambda t: t.header.__setitem__(1, 1 << 33),
}


@pytest.mark.parametrize("name", METADATA)
def test_damaged_metadata_are_refused_when_opened(split_copy, name):
    METADATA[name](Beton(split_copy))
    with pytest.raises(ValueError, match=r"train\.beton.*data_prep beton"):
        beton(split_copy)


@pytest.mark.parametrize(
    ("field", "value"), [("width", 63), ("width", 65), ("height", 63), ("height", 65), ("width", 32), ("height", 200)]
)
def test_metadata_of_another_picture_s_size_are_refused(split_copy, field, value):
    """In an older manifest, without the tables' digest, the picture's own header tells."""
    manifest = read_manifest(split_copy)
    write_manifest(dataclasses.replace(manifest, beton=dataclasses.replace(manifest.beton, tables_sha256=None)))
    set_field(field, value)(Beton(split_copy))
    with pytest.raises(ValueError, match=r"sample 3 of .*\(64, 64\)"):
        beton(split_copy).batch(np.array([2, 3]), epoch=0)


def test_raw_pixels_of_another_form_are_refused(raw_split, tmp_path):
    """As many bytes, with the same CRC: 32 x 128 pixels instead of 64 x 64 would be another picture."""
    copy = Path(shutil.copytree(raw_split.parent, tmp_path / "copy")) / raw_split.name
    set_field("width", 32)(tables := Beton(copy))
    set_field("height", 128)(tables)
    with pytest.raises(
        ValueError, match=r"train\.beton has other tables than those that were written.*data_prep beton"
    ):
        beton(copy)


def test_a_size_too_short_is_refused(split_copy):
    tables = Beton(split_copy)
    set_size(int(tables.table["size"][tables.place(3)]) - 40)(tables)
    with pytest.raises(ValueError, match="sample 3"):
        beton(split_copy)


def test_a_beton_that_is_missing_cut_or_not_recorded(split_copy):
    path, manifest = split_copy.parent / "train.beton", read_manifest(split_copy)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"train\.beton has \d+ bytes.*data_prep beton"):
        beton(split_copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.beton is missing.*data_prep beton"):
        beton(split_copy)
    write_manifest(dataclasses.replace(manifest, beton=None))
    with pytest.raises(FileNotFoundError, match=r"has no \.beton.*data_prep beton"):
        beton(split_copy)


def test_a_file_that_is_no_beton_is_refused(split_copy):
    path = split_copy.parent / "train.beton"
    for content in (bytes(path.stat().st_size), np.random.RandomState(0).bytes(path.stat().st_size)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train\.beton"):
            beton(split_copy)
