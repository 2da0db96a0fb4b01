"""The .beton of a manifest: the same samples, read by ffcv too; no partial file under its name."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_pictures import check, contents, shard_source

from data_prep import manifest as manifest_module
from data_prep.beton import BetonOptions, write_beton
from data_prep.beton_format import BetonFile
from data_prep.beton_reader import BetonReader
from data_prep.images import decode_rgb
from data_prep.tar_shards import read_index, read_pictures


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
    assert shard_source(source, copy).beton == manifest.beton
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
    add = BetonFile.add
    monkeypatch.setattr(
        BetonFile, "add", lambda self, stored: add(self, stored._replace(payload=stored.payload[:-1] + b"\0"))
    )
    with pytest.raises(ValueError, match="sample 0 is not what was written"):
        write_beton(BetonOptions(copy / "train.manifest.json", processes=1))
    assert not list(copy.glob("*.beton*")) and not list(copy.glob(".*.tmp"))


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


# ---- straight from a source ----


def from_source(source: Path, out: Path, **options):
    return write_beton(
        BetonOptions(source=str(source), out=str(out), samples_per_shard=7, **({"processes": 1} | options))
    )


@pytest.mark.parametrize("options", [{}, {"mode": "raw"}, {"max_resolution": 30}, {"mode": "proportion"}])
def test_from_the_source_it_is_the_file_that_the_shards_give(source, copy, tmp_path, options):
    """The same samples in the same order, so the very same bytes; and a manifest without shards."""
    of_shards = write_beton(BetonOptions(copy / "train.manifest.json", processes=1, **options))
    alone = from_source(source, tmp_path / "alone", **options)
    for name in ("train.beton", "train.beton.idx"):
        assert (tmp_path / "alone" / name).read_bytes() == (copy / name).read_bytes()
    assert alone.shards == () and alone.beton == of_shards.beton
    assert (alone.classes, alone.class_counts, alone.source) == (
        of_shards.classes,
        of_shards.class_counts,
        of_shards.source,
    )
    assert {note.key for note in alone.repaired} == {note.key for note in of_shards.repaired}
    assert check(tmp_path / "alone") == check(tmp_path / "alone", quick=True) == []
    assert contents(tmp_path / "alone").keys() == {"train.beton", "train.beton.idx", "train.manifest.json"}


def test_it_joins_the_manifest_of_the_same_shards_and_they_join_its_own(source, shards, copy, tmp_path):
    manifest = from_source(source, copy)
    assert manifest.shards and manifest.beton
    assert check(copy) == []
    alone = from_source(source, tmp_path / "alone")
    both = shard_source(source, tmp_path / "alone")
    assert both.beton == alone.beton and len(both.shards) == 4
    assert check(tmp_path / "alone") == []
    with pytest.raises(ValueError, match="seed 0 -> 1"):
        from_source(source, copy, seed=1)


def test_any_number_of_processes_and_a_second_run_give_the_same_bytes(source, tmp_path):
    from_source(source, tmp_path / "one", max_resolution=30)
    from_source(source, tmp_path / "two", max_resolution=30, processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    written = (tmp_path / "two" / "train.beton").stat().st_mtime_ns
    from_source(source, tmp_path / "two", max_resolution=30)
    assert (tmp_path / "two" / "train.beton").stat().st_mtime_ns == written


def test_a_picture_that_cannot_be_read_stops_it(source, tmp_path):
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    (mine / "bee" / "3.JPEG").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bee/3\.JPEG: is not a picture.*--on-error skip"):
        from_source(mine, tmp_path / "out")
    assert contents(tmp_path / "out") == {}
    shard_source(mine, tmp_path / "out", on_error="skip")
    with pytest.raises(ValueError, match=r"leaves out 1 pictures.*data_prep beton"):
        from_source(mine, tmp_path / "out")
    assert write_beton(BetonOptions(tmp_path / "out" / "train.manifest.json", processes=1)).beton.samples == 23
    assert check(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "name either a manifest"),
        ({"manifest": Path("a"), "source": "b"}, "name either a manifest"),
        ({"source": "a"}, "--source needs --out"),
        ({"source": "a", "out": "s3://b"}, "from a disk alone"),
        ({"manifest": Path("a"), "seed": 1}, "--seed would change nothing"),
        ({"source": "a", "out": "b", "split": "x/y"}, "--split"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        BetonOptions(**options)


def test_a_beton_killed_while_it_is_written_leaves_nothing_under_its_name(copy):
    """And the next run writes it whole, without what the dead one left."""
    code = (
        "import os, sys; from pathlib import Path; from data_prep import beton_format as f; "
        "from data_prep.beton import BetonOptions, write_beton; add = f.BetonFile.add\n"
        "def dying(self, stored):\n"
        "    add(self, stored)\n"
        "    if self.added == int(sys.argv[2]): self.file.flush(); os.kill(os.getpid(), 9)\n"
        "f.BetonFile.add = dying; write_beton(BetonOptions(Path(sys.argv[1]), processes=1))"
    )
    before = contents(copy)
    root = Path(__file__).resolve().parents[2]
    for at in (1, 13, 24):
        command = [sys.executable, "-c", code, str(copy / "train.manifest.json"), str(at)]
        assert subprocess.run(command, cwd=root).returncode == -signal.SIGKILL
        assert {name: data for name, data in contents(copy).items() if not name.endswith(".tmp")} == before
    write_beton(BetonOptions(copy / "train.manifest.json", processes=1))
    assert contents(copy).keys() == before.keys() | {"train.beton", "train.beton.idx"}
    assert check(copy) == []
