"""Shards whose JPEGs were rewritten with restart markers: the same samples and pixels, however they are made."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from source_pictures import assert_same_picture, check, contents, originals, picture, shard_source

from data_prep import parts, restart_markers
from data_prep.beton import BetonOptions, write_beton
from data_prep.beton_reader import BetonReader
from data_prep.contact_sheet import InspectOptions, inspect
from data_prep.finalize import FinalizeOptions, finalize
from data_prep.images import PictureOptions, decode_rgb
from data_prep.jpeg import well_formed
from data_prep.manifest import read_manifest
from data_prep.sources.image_folder import ImageFolder
from data_prep.stats import StatsOptions, stats
from data_prep.storage import LocalFolder
from data_prep.summary import manifest_summary, shards_line
from data_prep.tar_shards import read_index, read_pictures

DRI = b"\xff\xdd\x00\x04"


def marked(source: Path, out: Path, **options):
    return shard_source(source, out, **({"restart_markers": True} | options))


def pictures_in(folder: Path) -> list[bytes]:
    return [
        data
        for record in read_manifest(folder / "train.manifest.json").shards
        for data in read_pictures(folder / record.name, read_index(folder, record))
    ]


@pytest.fixture(scope="module")
def mixed(source, tmp_path_factory) -> Path:
    """The odd pictures of `source`, and a progressive one."""
    root = Path(shutil.copytree(source, tmp_path_factory.mktemp("mixed") / "pictures"))
    picture(100, 90, 70).save(root / "cat" / "progressive.jpg", "JPEG", progressive=True)
    return root


@pytest.fixture(scope="module")
def out(mixed, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("marked")
    marked(mixed, folder)
    return folder


def test_same_samples_same_pixels_and_the_outcomes_are_counted(mixed, out, tmp_path):
    plain, manifest = shard_source(mixed, tmp_path / "plain"), read_manifest(out / "train.manifest.json")
    assert manifest.options == plain.options | {"restart_markers": True} and "restart_markers" not in plain.options
    assert (manifest.repaired, manifest.source) == (plain.repaired, plain.source)
    kept = 0
    for before, after in zip(pictures_in(tmp_path / "plain"), pictures_in(out), strict=True):
        np.testing.assert_array_equal(decode_rgb(before), decode_rgb(after))
        kept += before == after
        assert (DRI in after) == (before != after)
    assert kept == 1  # the progressive one
    outcomes = parts.restart_marker_outcomes(LocalFolder(out), manifest)
    assert outcomes == {"rewritten": 24, "kept, progressive": 1}
    summary = manifest_summary(manifest, "here", 1.0, outcomes)
    assert summary["restart_markers"] == outcomes
    assert "restart markers: 24 rewritten, 1 kept, progressive;" in shards_line(summary)
    assert parts.restart_marker_outcomes(LocalFolder(tmp_path / "plain"), plain) == {}
    assert "restart" not in shards_line(manifest_summary(plain, "here", 1.0))


def test_keys_and_labels_are_the_sources(source, tmp_path):
    import webdataset

    marked(source, tmp_path / "out")
    expected = originals(source)
    found = webdataset.WebDataset(sorted(map(str, (tmp_path / "out").glob("*.tar"))), shardshuffle=False).decode("rgb8")
    for sample in found:
        pixels, label = expected.pop(sample["__key__"])
        assert sample["cls"] == label
        assert_same_picture(sample["__key__"], sample["jpg"], pixels)
    assert not expected


def test_same_bytes_from_any_processes_and_tasks(mixed, out, tmp_path):
    marked(mixed, tmp_path / "two", processes=2)
    for task in (1, 0):
        marked(mixed, tmp_path / "tasks", task=task, num_tasks=2)
    finalize(FinalizeOptions(str(tmp_path / "tasks")))
    assert contents(out) == contents(tmp_path / "two") == contents(tmp_path / "tasks")


def test_made_of_existing_shards_they_are_the_same(mixed, out, tmp_path):
    shard_source(mixed, tmp_path / "plain")
    marked(tmp_path / "plain" / "train.manifest.json", tmp_path / "again", keep_order=True)
    assert pictures_in(tmp_path / "again") == pictures_in(out)
    marked(tmp_path / "again" / "train.manifest.json", tmp_path / "twice", keep_order=True)
    assert pictures_in(tmp_path / "twice") == pictures_in(out)


def test_reduced_pictures_are_rewritten_too(mixed, tmp_path):
    options = {"picture": PictureOptions(max_side=24)}
    shard_source(mixed, tmp_path / "plain", **options)
    marked(mixed, tmp_path / "marked", **options)
    for before, after in zip(pictures_in(tmp_path / "plain"), pictures_in(tmp_path / "marked"), strict=True):
        np.testing.assert_array_equal(decode_rgb(before), decode_rgb(after))
        assert DRI in after and DRI not in before
        assert max(well_formed(after)[2:4]) == 24


def test_verify_inspect_stats_and_beton_take_them(mixed, out, tmp_path):
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    assert check(copy) == []
    sheet = inspect(InspectOptions(copy / "train-000000.tar", tmp_path / "sheet.png"))
    assert (sheet.pictures, sheet.damaged) == (7, 0)
    shard_source(mixed, tmp_path / "plain")
    manifests = [str(folder / "train.manifest.json") for folder in (copy, tmp_path / "plain")]
    with_markers, without = stats(StatsOptions(tuple(manifests), processes=1)).to_json()["splits"]
    for name in ("pictures", "sizes", "forms", "progressive"):
        assert with_markers[name] == without[name]
    manifest = write_beton(BetonOptions(copy / "train.manifest.json", processes=1))
    reader = BetonReader(copy / "train.beton")
    payloads = [bytes(reader.payload(sample_id)) for sample_id in range(manifest.num_samples)]
    assert payloads == pictures_in(copy)
    assert check(copy) == []


def test_with_and_without_are_told_apart(mixed, out, tmp_path):
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    with pytest.raises(ValueError, match="restart_markers True -> None"):
        shard_source(mixed, copy)
    assert contents(copy) == contents(out)
    plain = tmp_path / "plain"
    shard_source(mixed, plain)
    with pytest.raises(ValueError, match="restart_markers None -> True"):
        marked(mixed, plain)
    # Without its manifest and plan, a finished shard of the one is still none of the other.
    for folder in (plain, copy):
        (folder / "train.manifest.json").unlink()
        (folder / ".train.parts" / "plan.json").unlink()
    marked(mixed, plain)
    shard_source(mixed, copy)
    assert pictures_in(plain) == pictures_in(out) != pictures_in(copy)


def test_killed_it_goes_on_and_counts_all(mixed, out, tmp_path):
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    (copy / "train-000002.tar").unlink()
    (copy / "train.manifest.json").unlink()
    stamps = {path.name: path.stat().st_mtime_ns for path in copy.glob("*.tar")}
    manifest = marked(mixed, copy)
    assert contents(copy) == contents(out)
    assert {name: (copy / name).stat().st_mtime_ns for name in stamps} == stamps
    assert sum(parts.restart_marker_outcomes(LocalFolder(copy), manifest).values()) == 25


def test_shards_from_before_the_option_are_good_still(source, tmp_path):
    """What a job without it depends on has not changed."""
    job = parts.ShardJob(ImageFolder(source), LocalFolder(tmp_path), "train", "x", (), PictureOptions(), "fail")
    line = f"{parts.LAYOUT_VERSION} {PictureOptions()}\n"
    assert job.digest() == hashlib.sha256(line.encode()).hexdigest()
    assert dataclasses.replace(job, restart_markers=True).digest() != job.digest()
    shard_source(source, tmp_path / "out")
    record = tmp_path / "out" / ".train.parts" / "train-000000.tar.json"
    body = json.loads(record.read_text())
    assert body.pop("restart_markers") == {}
    record.write_text(json.dumps(body))
    assert parts.read_part(LocalFolder(tmp_path / "out"), "train", "train-000000.tar").restart_markers == {}


def test_without_its_library_the_option_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    restart_markers.rewriter.cache_clear()
    monkeypatch.setattr(restart_markers, "LIBRARY", tmp_path / "none.so")
    try:
        with pytest.raises(ValueError, match=r"--restart-markers needs none\.so.*libjpeg-dev.*make setup"):
            marked(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert shard_source(source, tmp_path / "plain").num_samples == 24
    finally:
        restart_markers.rewriter.cache_clear()


def test_command_line(mixed, tmp_path, capsys, monkeypatch):
    from data_prep.__main__ import main

    arguments = ["shard", "--source", mixed, "--out", tmp_path / "out", "--restart-markers", "--processes", "1"]
    monkeypatch.setattr("sys.argv", ["data_prep", "--json", *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    assert main() == 0
    assert json.loads(capsys.readouterr().out)["restart_markers"] == {"rewritten": 24, "kept, progressive": 1}
