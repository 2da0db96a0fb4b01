"""Tar and .beton readers: the same samples from both, and no damage of a tar that ends as a picture in a batch."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_shards import CLASSES, EXACT, STRAY_BYTES, beton, tars

from data_prep.manifest import read_manifest
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig, open_split

IDS = np.array([13, 2, 23, 7])
READERS = pytest.mark.parametrize("reader", [tars, beton], ids=["tars", "beton"])


# The same from both


def test_both_hold_the_same_ids_labels_and_classes(jpg_split):
    one, other = tars(jpg_split), beton(jpg_split)
    assert len(one) == len(other) == 24
    labels = one.labels_of(np.arange(24))
    assert labels.dtype == other.labels_of(IDS).dtype == np.int64
    assert np.array_equal(labels, other.labels_of(np.arange(24)))
    assert one.classes == other.classes == CLASSES
    assert np.bincount(labels).tolist() == [8, 8, 8]
    assert one.shard_sizes == other.shard_sizes == (7, 7, 7, 3)


@pytest.mark.parametrize("epoch", [None, 0, 3])
def test_raw_pixels_are_equal_to_the_bit_where_nothing_is_resized(raw_split, epoch):
    """So both took the same box and the same side of the mirror, for each sample."""
    one, other = (read(raw_split).batch(np.arange(24), epoch) for read in (tars, beton))
    assert one.images.shape == (24, 32, 32, 3)
    assert one.images.numpy().tobytes() == other.images.numpy().tobytes()
    assert one.labels.tolist() == other.labels.tolist()
    assert one.sample_ids.tolist() == other.sample_ids.tolist() == list(range(24))


@pytest.mark.parametrize("epoch", [None, 0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_jpegs_of_all_sizes_are_equal_to_the_bit(sizes_split, epoch, interpolation):
    augment = AugmentConfig(eval_crop_share=0.9, interpolation=interpolation)
    one, other = (read(sizes_split, augment, 64).batch(np.arange(24), epoch).images.numpy() for read in (tars, beton))
    assert np.array_equal(one, other)
    neighbours = np.abs(one.astype(int) - np.roll(other, 1, axis=0)).mean(axis=(1, 2, 3))
    assert neighbours.min() > 40  # another sample's picture is far away


@READERS
def test_a_batch_depends_on_the_ids_alone(jpg_split, reader):
    source = reader(jpg_split)
    whole = source.batch(IDS, epoch=1)
    for i, sample in enumerate(IDS):
        alone = source.batch(IDS[i : i + 1], epoch=1)
        assert alone.images[0].equal(whole.images[i])
        assert (alone.labels.item(), alone.sample_ids.item()) == (source.labels_of(IDS)[i], sample)
    assert reader(jpg_split).batch(IDS[::-1].copy(), epoch=1).images.equal(whole.images.flip(0))
    assert not source.batch(IDS, epoch=2).images.equal(whole.images)
    assert not reader(jpg_split, seed=1).batch(IDS, epoch=1).images.equal(whole.images)
    assert source.batch(IDS, epoch=None).images.equal(reader(jpg_split, seed=1).batch(IDS, epoch=None).images)


def test_evaluation_pixels_are_the_source_s(jpg_split):
    reader = tars(jpg_split)
    batch = reader.batch(np.arange(24), epoch=None)
    for i in range(24):
        expected = np.asarray(Image.open(io.BytesIO(reader.read(i))).convert("RGB"))[16:48, 16:48]
        assert np.array_equal(batch.images[i].numpy(), expected)


@READERS
def test_a_jpeg_with_stray_bytes_is_read(jpg_split, reader):
    """turbojpeg reports a warning there in the same way as an error; data_prep lets such pictures through."""
    originals = tars(jpg_split)
    stray = [i for i in range(24) if STRAY_BYTES + b"\xff\xda" in originals.read(i)]
    assert len(stray) == 1
    expected = np.asarray(Image.open(io.BytesIO(originals.read(stray[0]))).convert("RGB"))[16:48, 16:48]
    assert np.array_equal(reader(jpg_split).batch(np.array(stray), None).images[0].numpy(), expected)


# Damaged tars


def test_every_flipped_byte_is_refused_naming_shard_and_sample(split_copy):
    manifest = read_manifest(split_copy)
    reader = tars(split_copy)
    sample = 9  # the third of the second shard
    data, tar = reader.read(sample), split_copy.parent / manifest.shards[1].name
    whole = tar.read_bytes()
    start = whole.index(data)
    for place in (0, 20, len(data) // 2, len(data) - 1):
        changed = bytearray(whole)
        changed[start + place] ^= 1
        tar.write_bytes(changed)
        with pytest.raises(ValueError) as error:
            tars(split_copy).batch(np.array([1, sample]), epoch=0)
        assert "sample 9" in str(error.value) and str(tar) in str(error.value) and "verify" in str(error.value)
    tar.write_bytes(whole)
    tars(split_copy).batch(np.array([1, sample]), epoch=0)


def test_a_cut_tar_is_refused_when_opened(split_copy):
    tar = split_copy.parent / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-000001\.tar has \d+ bytes.*verify"):
        tars(split_copy)


def test_a_tar_cut_after_opening_is_refused(split_copy):
    reader = tars(split_copy)
    tar = split_copy.parent / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"sample 9 .*train-000001\.tar"):
        reader.batch(np.array([9]), epoch=0)


@pytest.mark.parametrize("name", ["train-000002.tar", "train-000002.idx"])
def test_a_missing_file_is_named(split_copy, name):
    (split_copy.parent / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing.*verify"):
        tars(split_copy)


@pytest.mark.parametrize("place", [0, 9, 40, -1])
def test_a_damaged_index_is_refused(split_copy, place):
    path = split_copy.parent / "train-000000.idx"
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-000000\.idx"):
        tars(split_copy)


def test_shards_of_another_manifest_are_refused(split_copy):
    """Two whole shards with their indexes change names: sizes, CRCs and class counts may all still fit."""
    folder = split_copy.parent
    for suffix in ("tar", "idx"):
        one, other = (folder / f"train-00000{i}.{suffix}" for i in (0, 1))
        (folder / "aside").write_bytes(one.read_bytes())
        one.write_bytes(other.read_bytes())
        other.write_bytes((folder / "aside").read_bytes())
    manifest = read_manifest(split_copy)
    # Tars are filled to whole records of 10,240 bytes, so that equal sizes are common.
    sizes = {(folder / record.name).stat().st_size for record in manifest.shards[:2]}
    assert len(sizes) == 1
    with pytest.raises(ValueError, match=r"train-000000\.idx is not the index that .*verify .*train\.manifest\.json"):
        tars(split_copy)


def test_open_files_stay_within_their_limit(jpg_split, monkeypatch):
    reader, expected = tars(jpg_split), tars(jpg_split)
    files = reader.source._files
    monkeypatch.setattr(files, "_most", 2)
    for sample in (0, 8, 15, 23, 1, 9):
        assert reader.read(sample) == expected.read(sample)
        assert len(files._files) <= 2


# Opening a split


def opened(manifest: Path, **options):
    augment = options.pop("augment", EXACT)
    return open_split(str(manifest), DataConfig(image_size=32, **options), augment, seed=0)


@pytest.mark.parametrize("form", ["wds", "ffcv"])
def test_label_map(jpg_split, tmp_path, form):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"ant": "small", "bee": "small", "cat": "large"}))
    plain, mapped = opened(jpg_split, format=form), opened(jpg_split, format=form, label_map=path)
    assert mapped.classes == ("large", "small")
    assert np.array_equal(mapped.labels_of(IDS), np.array([1, 1, 0])[plain.labels_of(IDS)])
    batch = mapped.batch(IDS, epoch=0)
    assert batch.labels.tolist() == mapped.labels_of(IDS).tolist()
    assert batch.images.equal(plain.batch(IDS, epoch=0).images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ('["ant"]', "JSON object of names"),
        ('{"ant": 1, "bee": 2, "cat": 3}', "JSON object of names"),
        ('{"ant": "x", "bee": "y"}', r"leaves out \['cat'\]"),
        ('{"ant": "x", "bee": "y", "cat": "y", "dog": "y"}', r"names \['dog'\]"),
    ],
)
def test_label_map_faults(jpg_split, tmp_path, content, message):
    path = tmp_path / "map.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=rf"data\.label_map .*map\.json.*{message}"):
        opened(jpg_split, label_map=path)


def test_a_missing_manifest_or_a_folder_is_refused(jpg_split):
    with pytest.raises(FileNotFoundError, match=r"no manifest at .*val\.manifest\.json.*data_prep shard"):
        opened(jpg_split.with_name("val.manifest.json"))
    with pytest.raises(ValueError, match=r"is a folder.*train\.manifest\.json"):
        opened(jpg_split.parent)


@pytest.mark.parametrize(("options", "name"), [({"image_size": 0}, "image_size"), ({"workers": -1}, "workers")])
def test_out_of_range_options_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=rf"data\.{name} is"):
        DataConfig(**options)


@READERS
def test_checksums_are_looked_at_unless_asked_not_to(split_copy, reader):
    """Off, a flipped bit of a picture's entropy code passes as some other picture: that is why it is on."""
    name = "train-000000.tar" if reader is tars else "train.beton"
    place = reader(split_copy).source.index.records(np.array([3]))[0]
    path = split_copy.parent / name
    data = bytearray(path.read_bytes())
    data[int(place["offset"]) + int(place["size"]) * 2 // 3] ^= 1
    expected = reader(split_copy).batch(np.array([3]), None).images
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"sample 3 .*CRC"):
        reader(split_copy).batch(np.array([3]), None)
    assert not reader(split_copy, check_crc=False).batch(np.array([3]), None).images.equal(expected)
