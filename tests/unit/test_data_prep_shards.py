"""Whole shards: other libraries read them, any number of processes gives the same bytes, verify names each fault."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import beton as beton_module
from data_prep import manifest as manifest_module
from data_prep.beton import BetonOptions, BetonReader, write_beton
from data_prep.distribute import ShardOptions, shard
from data_prep.images import decode_rgb
from data_prep.sources import ImageFolder
from data_prep.tar_shards import read_index, read_pictures
from data_prep.verify import VerifyOptions, verify

CLASSES = ("ant", "bee", "cat")
PER_CLASS = 8


def picture(seed: int, height: int = 32, width: int = 40) -> Image.Image:
    """A smooth picture of its own for each seed."""
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """3 classes of 8 pictures of several sizes; among them a PNG named .JPEG and a grey JPEG."""
    root = tmp_path_factory.mktemp("source")
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(PER_CLASS):
            seed = label * PER_CLASS + i
            image = picture(seed, 32 + seed, 40)
            path = root / name / f"{i}.JPEG"
            if i == 1:
                image.save(path, "PNG")
            else:
                (image.convert("L") if i == 2 else image).save(path, "JPEG", quality=90)
    return root


def make(source: Path, out: Path, **options):
    return shard(ShardOptions(source=source, out=out, **({"samples_per_shard": 7, "processes": 1} | options)))


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    make(source, out)
    return out


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def check(folder: Path, **options) -> list[str]:
    return verify(VerifyOptions(manifest=folder / "train.manifest.json", processes=1, **options))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def originals(source: Path) -> dict[str, tuple[np.ndarray, int]]:
    """key -> (pixels as Pillow sees the source, label)."""
    return {
        sample.key: (decode_rgb((source / sample.path).read_bytes()), sample.label)
        for sample in ImageFolder(source).scan().samples
    }


def assert_same_picture(key: str, pixels: np.ndarray, expected: np.ndarray) -> None:
    if key.endswith("_1"):  # the PNG was repaired, so encoded once
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected).mean() < 2
    else:
        np.testing.assert_array_equal(pixels, expected)


# ---- what is in the shards ----


def test_tarfile_reads_the_source_s_pictures_and_labels(source, shards):
    expected = originals(source)
    manifest = manifest_module.read_manifest(shards / "train.manifest.json")
    assert manifest.classes == CLASSES
    assert manifest.class_counts == (PER_CLASS,) * 3
    assert [s.samples for s in manifest.shards] == [7, 7, 7, 3]
    assert {(note.key, note.reason) for note in manifest.repaired} == {
        (f"{name}_1", f"{name}/1.JPEG: PNG, mode RGB") for name in CLASSES
    }
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
        for name in (n for n in tar.getnames() if n.endswith(".jpg") and not n.endswith("_1.jpg")):
            label, stem = name.removesuffix(".jpg").split("_")
            assert tar.extractfile(name).read() == (source / label / f"{stem}.JPEG").read_bytes()


def test_keep_order_is_the_source_s(source, tmp_path):
    make(source, tmp_path / "out", keep_order=True)
    keys = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            keys += [n.removesuffix(".jpg") for n in tar.getnames() if n.endswith(".jpg")]
    assert keys == [sample.key for sample in ImageFolder(source).scan().samples]


def test_same_bytes_for_any_processes_and_on_a_second_run(source, shards, tmp_path):
    expected = contents(shards)
    make(source, tmp_path / "two", processes=2)
    assert contents(tmp_path / "two") == expected
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "two").glob("*.tar")}
    make(source, tmp_path / "two", processes=2)
    assert contents(tmp_path / "two") == expected
    assert {p: p.stat().st_mtime_ns for p in before} == before  # nothing was written again


def test_a_damaged_or_missing_shard_is_done_again_and_the_rest_kept(copy, source, shards):
    (copy / "train-000001.tar").write_bytes(b"x")
    (copy / "train-000002.idx").unlink()
    kept = (copy / "train-000000.tar").stat().st_mtime_ns
    make(source, copy)
    assert contents(copy) == contents(shards)
    assert (copy / "train-000000.tar").stat().st_mtime_ns == kept


def test_a_changed_picture_is_not_taken_for_done(source, tmp_path):
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    make(mine, tmp_path / "out")
    picture(99).save(mine / "cat" / "7.JPEG", "JPEG")
    make(mine, tmp_path / "out")
    found = {}
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {n: tar.extractfile(n).read() for n in tar.getnames()}
    assert found["cat_7.jpg"] == (mine / "cat" / "7.JPEG").read_bytes()
    assert check(tmp_path / "out") == []


def test_another_source_or_other_options_do_not_overwrite(source, copy, tmp_path):
    before = contents(copy)
    with pytest.raises(ValueError, match="seed 0 -> 1"):
        make(source, copy, seed=1)
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    (mine / "ant" / "0.JPEG").unlink()
    with pytest.raises(ValueError, match="another source"):
        make(mine, copy)
    assert contents(copy) == before


def test_two_splits_share_a_folder(source, copy):
    make(source, copy, split="val", samples_per_shard=24)
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
        make(mine, tmp_path / "out")
    assert not (tmp_path / "out" / "train.manifest.json").exists()
    manifest = make(mine, tmp_path / "out", on_error="skip")
    assert {note.key for note in manifest.skipped} == {"bee_3", "cat_0"}
    assert all(("truncated" in n.reason) == (n.key == "bee_3") for n in manifest.skipped)
    assert manifest.class_counts == (8, 7, 7)
    assert check(tmp_path / "out") == []
    with pytest.raises(ValueError, match="--on-error skip"):  # what was skipped does not count as done under "fail"
        make(mine, tmp_path / "out")
    for path in (mine / "cat").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="class 'cat' has no picture"):
        make(mine, tmp_path / "out2", on_error="skip")
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


def samples_of(folder: Path):
    manifest = manifest_module.read_manifest(folder / "train.manifest.json")
    for record in manifest.shards:
        entries = read_index(folder, record)
        for entry, data in zip(entries, read_pictures(folder / record.name, entries), strict=True):
            yield data, entry.label


def test_beton_holds_the_shards_samples_in_order(copy):
    for options in ({}, {"mode": "raw"}, {"mode": "proportion", "max_resolution": 40, "jpeg_quality": 80}):
        manifest = write_beton(BetonOptions(copy / "train.manifest.json", processes=1, **options))
        assert manifest == manifest_module.read_manifest(copy / "train.manifest.json")
        assert manifest.beton.samples == 24
        reader = BetonReader(copy / "train.beton")
        modes = set()
        for sample_id, (data, label) in enumerate(samples_of(copy)):
            original = decode_rgb(data)
            assert reader.labels[sample_id] == label
            pixels = reader.picture(sample_id)
            modes.add(int(reader.images[sample_id]["mode"]))
            if "max_resolution" in options:
                assert max(pixels.shape) == 40 and abs(pixels.shape[0] / pixels.shape[1] - original.shape[0] / 40) < 1
            elif options:
                np.testing.assert_array_equal(pixels, original)
            else:
                assert bytes(reader.payload(sample_id)) == data  # originals pass through
                assert np.abs(pixels.astype(int) - original).mean() < 3  # ffcv decodes with a coarser DCT
        assert modes == {"jpg": {0}, "raw": {1}, "proportion": {0, 1}}[options.get("mode", "jpg")]
        assert check(copy) == []
        once = (copy / "train.beton").read_bytes()
        if options.get("mode") == "proportion":
            (copy / "train.beton").unlink()
            write_beton(BetonOptions(copy / "train.manifest.json", processes=2, **options))
            assert (copy / "train.beton").read_bytes() == once

        damaged = bytearray(once)
        damaged[len(once) // 2] ^= 1
        (copy / "train.beton").write_bytes(damaged)
        assert check(copy, quick=True) == ["train.beton: its sha256 is not the manifest's"]
        (copy / "train.beton").write_bytes(once)


def test_doing_all_again_keeps_the_beton(source, copy):
    manifest = write_beton(BetonOptions(copy / "train.manifest.json", processes=1))
    before, written = contents(copy), (copy / "train.beton").stat().st_mtime_ns
    (copy / "train-000002.tar").unlink()
    assert make(source, copy).beton == manifest.beton
    write_beton(BetonOptions(copy / "train.manifest.json", processes=1))
    assert contents(copy) == before
    assert (copy / "train.beton").stat().st_mtime_ns == written


def test_ffcv_s_own_loader_reads_it(copy):
    write_beton(BetonOptions(copy / "train.manifest.json", processes=1))
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption

    pipelines = {"image": [CenterCropRGBImageDecoder((32, 32), 1.0)], "label": [IntDecoder()]}
    loader = Loader(str(copy / "train.beton"), 6, 1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    batches = [(images.copy(), labels.copy()) for images, labels in loader]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    expected = list(samples_of(copy))
    assert labels[:, 0].tolist() == [label for _, label in expected]
    for pixels, (data, _) in zip(images, expected, strict=True):
        original = Image.fromarray(decode_rgb(data))
        side = min(original.size)
        left, top = (original.width - side) // 2, (original.height - side) // 2
        cropped = original.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BOX)
        assert np.abs(pixels.astype(int) - np.asarray(cropped)).mean() < 6


def kill_first_child(stop: threading.Event) -> None:
    while not stop.is_set():
        children = multiprocessing.active_children()
        if len(children) == 2:
            os.kill(children[0].pid, signal.SIGKILL)
            return
        time.sleep(0.001)


def test_beton_with_a_killed_process_is_one_error_and_no_file(copy):
    before = contents(copy)
    stop = threading.Event()
    killer = threading.Thread(target=kill_first_child, args=(stop,))
    killer.start()
    try:
        with pytest.raises(ChildProcessError, match="died"):
            write_beton(BetonOptions(copy / "train.manifest.json", mode="raw"))
    finally:
        stop.set()
        killer.join()
    assert contents(copy) == before


def test_beton_of_a_damaged_shard_is_refused(copy):
    record = manifest_module.read_manifest(copy / "train.manifest.json").shards[0]
    entry = read_index(copy, record)[2]
    data = bytearray((copy / record.name).read_bytes())
    data[entry.offset + 9] ^= 1
    (copy / record.name).write_bytes(data)
    with pytest.raises(ValueError, match=r"train-000000.tar.*CRC"):
        write_beton(BetonOptions(copy / "train.manifest.json", processes=1))
    assert not list(copy.glob("*.beton")) and not list(copy.glob(".*.tmp"))


def test_beton_that_reads_back_wrong_is_not_published(copy, monkeypatch):
    store = beton_module._store

    def store_wrong(destination, stored, malloc):
        store(destination, stored._replace(payload=stored.payload[:-1] + b"\0"), malloc)

    monkeypatch.setattr(beton_module, "_store", store_wrong)
    with pytest.raises(ValueError, match="sample 0 is not what was written"):
        write_beton(BetonOptions(copy / "train.manifest.json", processes=1))
    assert not list(copy.glob("*.beton")) and not list(copy.glob(".*.tmp"))


def test_verify_compares_beton_with_shards(copy):
    """A .beton of other samples, recorded with its true hash, is still found."""
    import dataclasses

    manifest = write_beton(BetonOptions(copy / "train.manifest.json", processes=1))
    order = [manifest.shards[1], manifest.shards[0], *manifest.shards[2:]]
    swapped = dataclasses.replace(manifest, shards=tuple(order))
    manifest_module.write_manifest(swapped)
    info = json.loads((copy / "_info.json").read_text())
    info["splits"]["train"]["filenames"] = [s.name for s in order]
    (copy / "_info.json").write_text(json.dumps(info))
    assert check(copy, quick=True) == []
    assert any("train.beton: sample 0 is not the picture" in fault for fault in check(copy))


def test_ffcv_missing_is_one_error_with_the_mend(copy, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(ValueError, match=r"make setup.*libturbojpeg0-dev"):
        write_beton(BetonOptions(copy / "train.manifest.json"))
    assert not list(copy.glob("*.beton"))
    monkeypatch.undo()
    write_beton(BetonOptions(copy / "train.manifest.json"))
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(ValueError, match="make setup"):
        check(copy)
