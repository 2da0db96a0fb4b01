"""Shards as a source: the same samples again, made smaller or laid out anew."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from source_pictures import check, contents, originals, shard_source

from data_prep.beton import BetonOptions, write_beton
from data_prep.foreign import IndexOptions, index
from data_prep.images import PictureOptions, decode_rgb
from data_prep.manifest import read_manifest
from data_prep.sources.image_folder import ImageFolder
from data_prep.sources.shards import ShardSource
from data_prep.tar_shards import read_index, read_pictures


def samples_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    source = ShardSource(folder / "train.manifest.json")
    listing = source.scan()
    samples = [listing.sample(index) for index in range(len(listing))]
    pictures = zip(samples, source.read(samples), strict=True)
    return {sample.key: (data, sample.label) for sample, data in pictures}


def test_they_hold_the_source_s_samples_in_the_manifest_s_order(source, shards):
    listing, original = ShardSource(shards / "train.manifest.json").scan(), ImageFolder(source).scan()
    assert listing.classes == original.classes
    assert dict(zip(listing.keys, listing.labels.tolist(), strict=True)) == dict(
        zip(original.keys, original.labels.tolist(), strict=True)
    )
    manifest = read_manifest(shards / "train.manifest.json")
    in_order = [
        data for shard in manifest.shards for data in read_pictures(shards / shard.name, read_index(shards, shard))
    ]
    assert [data for data, _ in samples_of(shards).values()] == in_order


def test_laid_out_anew_they_keep_their_bytes(shards, tmp_path):
    manifest = shard_source(shards / "train.manifest.json", tmp_path, samples_per_shard=5, keep_order=True)
    assert [shard.samples for shard in manifest.shards] == [5, 5, 5, 5, 4]
    assert manifest.repaired == ()
    assert list(samples_of(tmp_path).items()) == list(samples_of(shards).items())
    assert check(tmp_path) == []


@pytest.mark.parametrize(("option", "side"), [("max_side", 30), ("short_side", 30)])
def test_made_smaller(source, shards, tmp_path, option, side):
    manifest = shard_source(shards / "train.manifest.json", tmp_path, picture=PictureOptions(**{option: side}))
    assert manifest.options[option] == side
    measure = max if option == "max_side" else min
    for key, (pixels, label) in originals(source).items():
        data, found = samples_of(tmp_path)[key]
        assert found == label
        small = decode_rgb(data)
        assert measure(small.shape[:2]) == min(side, measure(pixels.shape[:2]))
        assert np.abs(small.mean((0, 1)) - pixels.mean((0, 1))).max() < 6
    assert check(tmp_path) == []


def test_foreign_tars_with_odd_pictures_are_mended(source, tmp_path):
    """A .beton of them is refused, with that mend."""
    from twins import tar_of

    members = []
    for number, path in enumerate(sorted(source.rglob("*.JPEG"))):
        members += [(f"{number:03d}.jpg", path.read_bytes()), (f"{number:03d}.cls", b"%d" % (number // 8))]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "x.tar").write_bytes(tar_of(members))
    index(IndexOptions((str(foreign),), processes=1))
    with pytest.raises(ValueError, match="holds no CRCs: run `python -m data_prep index --hash`"):
        ShardSource(foreign / "train.manifest.json").scan()
    index(IndexOptions((str(foreign),), hash=True, processes=1))
    with pytest.raises(ValueError, match=r"sample 1\): no plain JPEG \(PNG.*shard --source"):
        write_beton(BetonOptions(foreign / "train.manifest.json", processes=1))
    manifest = shard_source(foreign / "train.manifest.json", tmp_path / "mended")
    assert sorted(note.key for note in manifest.repaired) == ["001", "002", "009", "010", "017", "018"]
    assert write_beton(BetonOptions(tmp_path / "mended" / "train.manifest.json", processes=1)).beton.samples == 24
    assert check(tmp_path / "mended") == []


def test_damaged_shards_are_refused_by_name(shards, tmp_path):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    before = contents(copy)
    manifest = read_manifest(copy / "train.manifest.json")
    entry = read_index(copy, manifest.shards[2])[3]
    path = copy / "train-000002.tar"
    for place in (entry.offset + 9, entry.offset - 512):
        bad = bytearray(before[path.name])
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"train-000002\.tar"):
            shard_source(copy / "train.manifest.json", tmp_path / "out")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000002\.tar"):
        shard_source(copy / "train.manifest.json", tmp_path / "out")
