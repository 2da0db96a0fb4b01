"""python -m benchmarks loader as a user runs it, small: what is measured, what is left out, and bad data."""

import pickle
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from benchmark_runs import quiet, refused
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import loader, loader_peers, samples
from benchmarks.harness import read_rows
from benchmarks.memory import Memory
from data_prep.beton import BetonOptions, write_beton
from data_prep.distribute import ShardOptions, shard
from pipeline.data import native

CLASSES = ("ant", "bee", "cat")
OWN = ("tars", "beton")


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    quiet(monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """3 classes of 8 smooth pictures."""
    root = tmp_path_factory.mktemp("source") / "pictures"
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(8):
            coarse = np.random.RandomState(8 * label + i).randint(0, 256, (4, 5, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((60, 48), Image.Resampling.BICUBIC)
            picture.save(root / name / f"{i}.JPEG", subsampling=0)
    return root


@pytest.fixture(scope="module")
def manifest(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    path = shard(ShardOptions(source=str(source), out=str(out), samples_per_shard=6, processes=1)).path
    write_beton(BetonOptions(manifest=path, processes=1))
    return path


def small(manifest: Path, output: Path, **options: object) -> list[str]:
    words = {"manifest": manifest, "output": output, "image-size": 16, "batch": 5, "rounds": 2, "workers": 1} | options
    return ["loader", *(str(w) for name, value in words.items() for w in (f"--{name}", *str(value).split()))]


def test_all_that_are_installed_do_the_same_work(manifest, tmp_path, capsys):
    """Those that are not are named; nothing is timed before the outputs were compared."""
    output = tmp_path / "loader.jsonl"
    there, missing = loader_peers.find_peers(list(loader_peers.PEERS))
    assert command.main(small(manifest, output, images=13, parts="epoch", rounds=1, note="in_a_test")) == 0
    rows = read_rows(output)
    assert [row["contestant"] for row in rows] == [*there, *OWN]
    assert {row["part"] for row in rows} == {"an epoch"}
    # 13 pictures are asked for, three shards of 6 hold them; some orders drop 18 mod 5.
    items = {row["contestant"]: {t["items"] for t in row["timings"]} for row in rows}
    assert items == {name: {15 if name in ("timm", *OWN) else 18} for name in items}
    conditions = rows[0]["conditions"]
    assert (conditions["samples"], conditions["shards"], rows[0]["note"]) == (18, 3, "in_a_test")
    assert conditions["versions_of_peers"]["webdataset"] == version("webdataset")
    assert str(manifest.parent) not in str(conditions)
    out, err = capsys.readouterr()
    assert "webdataset" in out and "added to" in out
    assert {"webdataset", "webdataset_io", "image_folder", "image_folder_io", "timm", "ffcv"} <= set(there)
    assert [line for line in err.splitlines() if line.startswith("not measured")] == missing


def test_first_batch_memory_and_decoding_are_measured(manifest, tmp_path, capsys, monkeypatch):
    watched = []

    def here(prepare) -> Memory:
        """Without the seconds of a new process, which test_benchmark_memory has."""
        watched.append(pickle.loads(pickle.dumps(prepare))()())
        return Memory(5_000_000, 1_000_000, 3)

    monkeypatch.setattr(loader, "peak_in_new_process", here)
    output = tmp_path / "loader.jsonl"
    words = small(manifest, output, contestants="tars webdataset", parts="first_batch memory decode", workers=2)
    assert command.main(words) == 0
    rows = {(row["part"], row["contestant"]): row for row in read_rows(output)}
    names = ("tars", "webdataset")
    alone = ("threads_1", "threads_2", "unchecked", "loader") if native.library() is not None else ()
    by_part = {"first batch": names, "decode alone": alone, "memory": names}
    assert list(rows) == [(part, name) for part, of_part in by_part.items() for name in of_part]
    assert rows["first batch", "tars"]["n"] == 2 and rows["first batch", "webdataset"]["compared_with"] == "tars"
    assert watched == [20, 24]  # pictures of an epoch
    assert [rows["memory", name]["own_bytes"] for name in names] == [5_000_000, 5_000_000]
    for name in alone:
        assert [t["items"] for t in rows["decode alone", name]["timings"]] == [20, 20]
    out, err = capsys.readouterr()
    assert ("of 2 threads' decoding alone reaches Python" in out) == bool(alone)
    assert ("not measured: decode alone" in err) == (not alone)


def test_peers_that_are_not_installed_are_named(manifest, tmp_path, monkeypatch, capsys):
    absent = loader_peers.PEERS["streaming"]._replace(module="no_such_library")
    monkeypatch.setitem(loader_peers.PEERS, "streaming", absent)
    assert loader_peers.find_peers(["timm", "streaming"]) == (
        ["timm"],
        ["not measured: streaming: no_such_library is not installed: `make peers` does that"],
    )
    err = refused(capsys, *small(manifest, tmp_path / "x.jsonl", contestants="streaming", parts="epoch"))
    assert err.splitlines()[0].startswith("not measured: streaming")
    assert err.splitlines()[1].startswith("error: --contestants streaming: none of them can be measured here")
    assert list(tmp_path.iterdir()) == []


def test_the_peers_folder_comes_last(monkeypatch):
    """What the project has installed is not hidden by what a peer brings."""
    monkeypatch.setattr(sys, "path", ["first"])
    loader_peers.find_peers([])
    loader_peers.find_peers([])
    assert sys.path == ["first", str(loader_peers._INSTALLED)]


@pytest.mark.parametrize(("pictures", "side"), [("original", None), ("256", "256")])
def test_samples_are_sharded_where_no_manifest_is_given(source, tmp_path, monkeypatch, capsys, pictures, side):
    with tarfile.open(tmp_path / "imagenet-sample.tar", "w") as tar:
        tar.add(source, "imagenet-sample")
    monkeypatch.setenv("NOISYNN_SAMPLES", str(tmp_path))
    data_prep, asked = samples.run_data_prep, []

    def without_codecs(*words: str) -> None:
        asked.append(words)
        if words[0] == "beton":
            raise ValueError("ffcv cannot be imported")
        if "--restart-markers" in words:
            raise ValueError("no libjpeg")
        data_prep(*words)

    monkeypatch.setattr(samples, "run_data_prep", without_codecs)
    options = loader.LoaderOptions(images=40, batch=8, workers=1, pictures=pictures)
    with loader._source(options, processes=1) as found:
        work = loader._work(found, options, tmp_path)
        assert (work.samples, len(work.tars)) == (48, loader.SHARDS_A_WORKER)
        assert list(loader._entrants(work, ("webdataset", "ffcv", "tars", "restart_tars", "beton"))) == [
            "webdataset",
            "tars",
        ]
    assert not found.manifest.exists()
    shards, _, restart = asked
    assert ("--short-side" in shards, shards[-1] == side) == (side is not None, side is not None)
    assert restart[-1] == "--restart-markers" and restart[5:-1] == shards[5:]  # the same samples by the same ids
    out, err = capsys.readouterr()
    assert "24 real pictures, each 2 times" in out
    assert err == "not measured: the .beton: ffcv cannot be imported\nnot measured: restart markers: no libjpeg\n"


def test_bad_data_is_refused(manifest, tmp_path, monkeypatch, capsys):
    output = tmp_path / "x.jsonl"
    assert "--batch 99 is larger than the 24 pictures" in refused(capsys, *small(manifest, output, batch=99))
    (tmp_path / "imagenet-sample.tar").write_bytes(b"no tar")
    monkeypatch.setenv("NOISYNN_SAMPLES", str(tmp_path))
    assert "cannot be unpacked" in refused(capsys, "loader", "--output", output)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in manifest.parent.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    tar = copy / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    err = refused(capsys, *small(copy / manifest.name, output))
    assert "train-000001.tar" in err and "CRC" in err and err.count("\n") == 1
    tar.unlink()
    assert "train-000001.tar is missing" in refused(capsys, *small(copy / manifest.name, output))
    assert not output.exists()
