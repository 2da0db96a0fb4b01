"""Whole shards: other libraries read them, any number of processes gives the same bytes, verify names each fault."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from source_pictures import CLASSES, PER_CLASS, assert_same_picture, check, contents, originals, picture, shard_source

from data_prep import manifest as manifest_module
from data_prep.images import decode_rgb
from data_prep.sources.image_folder import ImageFolder
from data_prep.tar_shards import read_index, read_pictures

# ---- what is in the shards ----


def test_tarfile_reads_the_source_s_pictures_and_labels(source, shards):
    expected = originals(source)
    manifest = manifest_module.read_manifest(shards / "train.manifest.json")
    assert manifest.classes == CLASSES
    assert manifest.class_counts == (PER_CLASS,) * 3
    assert [s.samples for s in manifest.shards] == [7, 7, 7, 3]
    png = {(f"{name}_1", f"{name}/1.JPEG", "PNG, mode RGB") for name in CLASSES}
    grey = {(f"{name}_2", f"{name}/2.JPEG", "JPEG, mode L") for name in CLASSES}
    assert {(note.key, note.path, note.reason) for note in manifest.repaired} == png | grey
    seen = []
    for record in manifest.shards:
        entries = read_index(shards, record)
        with tarfile.open(shards / record.name) as tar:
            members = tar.getmembers()
            jpgs, labels = members[::2], members[1::2]
            for entry, jpg, label in zip(entries, jpgs, labels, strict=True):
                key = jpg.name.removesuffix(".jpg")
                assert label.name == f"{key}.cls"
                assert (jpg.mtime, jpg.uid, jpg.gid, jpg.mode, jpg.uname) == (0, 0, 0, 0o644, "")
                assert (entry.offset, entry.size) == (jpg.offset_data, jpg.size)
                assert int(tar.extractfile(label).read()) == entry.label == expected[key][1]
                assert_same_picture(key, decode_rgb(tar.extractfile(jpg).read()), expected[key][0])
                seen.append(key)
    assert sorted(seen) == sorted(expected)
    first = [expected[key][1] for key in seen[:7]]
    assert len(set(first)) > 1  # classes are mixed


def test_originals_are_passed_through_unchanged(source, shards):
    with tarfile.open(shards / "train-000000.tar") as tar:
        for name in (n for n in tar.getnames() if n.endswith(".jpg") and not n.endswith(("_1.jpg", "_2.jpg"))):
            label, stem = name.removesuffix(".jpg").split("_")
            assert tar.extractfile(name).read() == (source / label / f"{stem}.JPEG").read_bytes()


def test_keep_order_is_the_source_s(source, tmp_path):
    shard_source(source, tmp_path / "out", keep_order=True)
    keys = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            keys += [n.removesuffix(".jpg") for n in tar.getnames() if n.endswith(".jpg")]
    assert keys == ImageFolder(source).scan().keys


def test_same_bytes_for_any_processes_and_on_a_second_run(source, shards, tmp_path):
    expected = contents(shards)
    shard_source(source, tmp_path / "two", processes=2)
    assert contents(tmp_path / "two") == expected
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "two").glob("*.tar")}
    shard_source(source, tmp_path / "two", processes=2)
    assert contents(tmp_path / "two") == expected
    assert {p: p.stat().st_mtime_ns for p in before} == before  # nothing was written again


def test_a_damaged_or_missing_shard_is_done_again_and_the_rest_kept(copy, source, shards):
    (copy / "train-000001.tar").write_bytes(b"x")
    (copy / "train-000002.idx").unlink()
    kept = (copy / "train-000000.tar").stat().st_mtime_ns
    shard_source(source, copy)
    assert contents(copy) == contents(shards)
    assert (copy / "train-000000.tar").stat().st_mtime_ns == kept


def test_a_changed_picture_is_not_taken_for_done(source, tmp_path):
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    shard_source(mine, tmp_path / "out")
    picture(99).save(mine / "cat" / "7.JPEG", "JPEG")
    shard_source(mine, tmp_path / "out")
    found = {}
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {n: tar.extractfile(n).read() for n in tar.getnames()}
    assert found["cat_7.jpg"] == (mine / "cat" / "7.JPEG").read_bytes()
    assert check(tmp_path / "out") == []


def test_another_source_or_other_options_do_not_overwrite(source, copy, tmp_path):
    before = contents(copy)
    with pytest.raises(ValueError, match="seed 0 -> 1"):
        shard_source(source, copy, seed=1)
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    (mine / "ant" / "0.JPEG").unlink()
    with pytest.raises(ValueError, match="another source"):
        shard_source(mine, copy)
    assert contents(copy) == before


def test_two_splits_share_a_folder(source, copy):
    shard_source(source, copy, split="val", samples_per_shard=24)
    info = json.loads((copy / "_info.json").read_text())["splits"]
    assert info["val"] == {
        "name": "val",
        "num_samples": 24,
        "filenames": ["val-000000.tar"],
        "shard_lengths": [24],
    }
    assert info["train"]["shard_lengths"] == [7, 7, 7, 3]
    assert check(copy) == []


def test_skip_lists_what_it_leaves_out(source, tmp_path):
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    (mine / "bee" / "3.JPEG").write_bytes((mine / "bee" / "3.JPEG").read_bytes()[:-50])
    (mine / "cat" / "0.JPEG").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"(3|0)\.JPEG.*--on-error skip"):
        shard_source(mine, tmp_path / "out")
    assert not (tmp_path / "out" / "train.manifest.json").exists()
    manifest = shard_source(mine, tmp_path / "out", on_error="skip")
    assert {note.key for note in manifest.skipped} == {"bee_3", "cat_0"}
    assert all(("truncated" in n.reason) == (n.key == "bee_3") for n in manifest.skipped)
    assert manifest.class_counts == (8, 7, 7)
    assert check(tmp_path / "out") == []
    with pytest.raises(ValueError, match="--on-error skip"):  # what was skipped does not count as done under "fail"
        shard_source(mine, tmp_path / "out")
    for path in (mine / "cat").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="class 'cat' has no picture"):
        shard_source(mine, tmp_path / "out2", on_error="skip")
    assert not (tmp_path / "out2" / "train.manifest.json").exists()


# ---- faults ----


def test_a_sound_folder_has_no_faults(shards):
    assert check(shards) == []
    assert check(shards, quick=True) == []


def test_every_flipped_bit_is_found(copy):
    """60 places spread over one tar and its index; quick and full."""
    for name in ("train-000002.tar", "train-000002.idx"):
        path = copy / name
        good = path.read_bytes()
        for i in range(30):
            bad = bytearray(good)
            bad[i * len(good) // 30] ^= 1 << (i % 8)
            path.write_bytes(bad)
            for quick in (True, False):
                faults = check(copy, quick=quick)
                assert faults and all("train-000002" in fault or "class" in fault for fault in faults), (name, i)
        path.write_bytes(good)
    assert check(copy) == []


def test_a_flip_in_a_picture_names_its_key(copy):
    record = manifest_module.read_manifest(copy / "train.manifest.json").shards[1]
    entry = read_index(copy, record)[4]
    path = copy / record.name
    with tarfile.open(path) as tar:
        key = tar.getnames()[8].removesuffix(".jpg")
    bad = bytearray(path.read_bytes())
    bad[entry.offset + entry.size // 2] ^= 0x10
    path.write_bytes(bad)
    assert f"{record.name}: {key}: its CRC is not what the index says" in check(copy)
    with pytest.raises(ValueError, match="another CRC"):
        list(read_pictures(path, read_index(copy, record)))


def test_cuts_missing_extra_and_swapped_files_are_found(copy):
    one, two = copy / "train-000000.tar", copy / "train-000001.tar"
    good = one.read_bytes()
    with tarfile.open(one) as tar:
        boundary = tar.getmembers()[6].offset
    for length in (0, 1, 511, 512, boundary, len(good) - 10240, len(good) - 1):
        one.write_bytes(good[:length])
        for quick in (True, False):
            assert any("train-000000.tar" in fault and "bytes" in fault for fault in check(copy, quick=quick))
    one.write_bytes(good)

    other = two.read_bytes()
    one.write_bytes(other), two.write_bytes(good)
    faults = check(copy)
    assert "train-000000.tar: holds the bytes of train-000001.tar" in faults
    assert "train-000001.tar: holds the bytes of train-000000.tar" in faults
    one.write_bytes(good), two.write_bytes(other)

    for name in ("train-000001.tar", "train-000001.idx"):
        saved = (copy / name).read_bytes()
        (copy / name).unlink()
        assert f"{name}: missing" in check(copy, quick=True)
        (copy / name).write_bytes(saved)
    (copy / "train-000009.tar").write_bytes(good)
    assert check(copy) == ["train-000009.tar: not in the manifest"]
    (copy / "train-000009.tar").unlink()
    (copy / "_info.json").write_text("{}")
    assert len(check(copy)) == 1 and "_info.json" in check(copy)[0]


def test_a_lie_that_every_hash_agrees_with_is_found(copy):
    """Labels changed in tar, index and hashes alike: the class counts still tell."""
    import hashlib

    manifest = manifest_module.read_manifest(copy / "train.manifest.json")
    record = manifest.shards[3]
    entries = read_index(copy, record)
    wrong = [entry._replace(label=0) for entry in entries]
    index = manifest_module.pack_index(wrong)
    (copy / record.index_name).write_bytes(index)
    data = bytearray((copy / record.name).read_bytes())
    with tarfile.open(copy / record.name) as tar:
        for member in tar.getmembers()[1::2]:
            data[member.offset_data : member.offset_data + 1] = b"0"
    (copy / record.name).write_bytes(data)
    import dataclasses

    forged = dataclasses.replace(
        record, sha256=hashlib.sha256(data).hexdigest(), index_sha256=hashlib.sha256(index).hexdigest()
    )
    manifest_module.write_manifest(dataclasses.replace(manifest, shards=(*manifest.shards[:3], forged)))
    assert check(copy, quick=True) == []
    assert any("class 'ant'" in fault for fault in check(copy))


# ---- other readers (webdataset, timm, ffcv: their imports take seconds, so they come last) ----


def test_webdataset_reads_the_same(source, shards):
    import webdataset

    expected = originals(source)
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert sorted(s["__key__"] for s in samples) == sorted(expected)
    for sample in samples:
        pixels, label = expected[sample["__key__"]]
        assert int(sample["cls"]) == label
        assert_same_picture(sample["__key__"], decode_rgb(sample["jpg"]), pixels)


def test_timm_reads_the_same(shards):
    from timm.data import create_dataset

    dataset = create_dataset("wds/", root=str(shards), split="train")
    assert len(dataset) == 24
    assert sorted(label for _, label in dataset) == sorted([0, 1, 2] * PER_CLASS)
