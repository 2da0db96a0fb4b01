"""python -m benchmarks as a user runs it: small real runs of each question, and bad input."""

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import loader, noise, samples
from benchmarks.harness import read_rows
from benchmarks.loader import Delivered
from data_prep.beton import BetonOptions, write_beton
from data_prep.distribute import ShardOptions, shard

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    """No sample pictures, and the test process keeps its own handler of SIGTERM."""
    monkeypatch.delenv("NOISYNN_SAMPLES", raising=False)
    monkeypatch.delenv("NOISYNN_TRACEBACK", raising=False)
    monkeypatch.setattr(command.signal, "signal", lambda *arguments: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """3 classes of 8 smooth pictures."""
    root = tmp_path_factory.mktemp("source") / "pictures"
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(8):
            coarse = np.random.RandomState(8 * label + i).randint(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((60, 48), Image.Resampling.BICUBIC).save(root / name / f"{i}.JPEG")
    return root


@pytest.fixture(scope="module")
def manifest(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    path = shard(ShardOptions(source=source, out=out, samples_per_shard=6, processes=1)).path
    write_beton(BetonOptions(manifest=path, processes=1))
    return path


def refused(capsys, *arguments) -> str:
    """Standard error of a command that ends with status 2."""
    try:
        status = command.main([str(word) for word in arguments])
    except SystemExit as error:  # tyro's own
        status = error.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), (status, out, err)
    assert "Traceback" not in err
    return err


def small(manifest: Path, output: Path, **options: object) -> list[str]:
    words = {"manifest": manifest, "output": output, "image-size": 16, "batch": 5, "rounds": 2, "workers": 1} | options
    return ["loader", *(str(w) for name, value in words.items() for w in (f"--{name}", value))]


def test_the_loaders_are_measured_on_a_manifest(manifest, tmp_path, capsys):
    output = tmp_path / "loader.jsonl"
    assert command.main(small(manifest, output, images=13, note="in a test")) == 0
    rows = read_rows(output)
    assert [(row["part"], row["contestant"]) for row in rows] == [
        (part, name) for part in ("an epoch", "first batch") for name in ("webdataset", "tars", "beton")
    ]
    by_name = {row["contestant"]: row for row in rows if row["part"] == "an epoch"}
    # 13 pictures are asked for, three shards of 6 hold them; the training order drops 18 mod 5.
    assert {t["items"] for t in by_name["webdataset"]["timings"]} == {18}
    assert {t["items"] for name in ("tars", "beton") for t in by_name[name]["timings"]} == {15}
    conditions = rows[0]["conditions"]
    assert (conditions["samples"], conditions["shards"], rows[0]["note"]) == (18, 3, "in a test")
    assert str(manifest.parent) not in str(conditions)
    text = capsys.readouterr().out
    assert "webdataset" in text and "added to" in text


def test_samples_are_sharded_where_no_manifest_is_given(source, tmp_path, monkeypatch, capsys):
    with tarfile.open(tmp_path / "imagenet-sample.tar", "w") as tar:
        tar.add(source, "imagenet-sample")
    monkeypatch.setenv("NOISYNN_SAMPLES", str(tmp_path))
    data_prep = samples._data_prep

    def without_ffcv(*words: str) -> None:
        if words[0] == "beton":
            raise ValueError("ffcv cannot be imported")
        data_prep(*words)

    monkeypatch.setattr(samples, "_data_prep", without_ffcv)
    options = loader.LoaderOptions(images=40, batch=8, workers=1)
    with loader._source(options) as found:
        work = loader._work(found.manifest, options)
        assert (work.samples, len(work.tars)) == (48, loader.SHARDS_A_WORKER)
        assert list(loader._entrants(work)) == ["webdataset", "tars"]
    assert not found.manifest.exists()
    out, err = capsys.readouterr()
    assert "24 real pictures, each 2 times" in out
    assert err == "the .beton reader is not measured: ffcv cannot be imported\n"


def test_the_noises_are_measured(tmp_path, capsys):
    output = tmp_path / "noise.jsonl"
    words = ["noise", "--megabytes", "1", "--rounds", "1", "--device", "cpu", "--output", str(output)]
    assert command.main(words) == 0
    text = capsys.readouterr().out
    assert "the specification" in text and "not fast code" in text
    rows = read_rows(output)
    kinds = ("gaussian", "salt_and_pepper", "circular_shift", "optimal_q")
    assert [(row["part"], row["contestant"]) for row in rows] == [
        (kind, name) for kind in kinds for name in ("eager", "reference", "torch.compile", "operator", "clone", "copy")
    ] + [("image_noise, gaussian", name) for name in ("eager", "torch.compile", "operator")]
    assert rows[0]["conditions"]["shape"] == [8, 197, 768]
    for row in rows:
        rate, moved = row["items_per_second"]["median"], row["gigabytes_per_second"]["median"]
        assert moved == pytest.approx((5e-9 if row["part"].startswith("image") else 8e-9) * rate)


@pytest.mark.parametrize("kind", noise.STRENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_noises_do_the_references_work_and_another_strength_is_noticed(kind, dtype):
    x = noise._input(noise.NoiseOptions(megabytes=1, dtype=dtype, device="cpu"))
    contestants = {contestant.name: contestant for contestant in noise._contestants(kind, x)}
    eager, reference, copy = (contestants[name] for name in ("eager", "reference", "copy"))
    assert noise.agree(eager.output(), contestants["operator"].output()) is None
    assert copy.output is None and eager.output is not None and reference.output is not None
    made = eager.output()
    assert noise.agree(made, reference.output()) is None
    weaker = made._replace(noisy=x + 0.9 * (made.noisy - x))
    assert noise.agree(made, weaker) is not None


def test_loaders_that_differ_are_noticed():
    pictures = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    one = Delivered(np.array([3, 2]), 100.0, (4, 4, 3), pictures)
    stale = torch.stack((pictures[0], torch.full((4, 4, 3), 150, dtype=torch.uint8)))
    assert loader.agree(one, one._replace(by_id=None)) is None
    for other, word in (
        (one._replace(shape=(4, 5, 3)), "pictures of"),
        (one._replace(label_counts=np.array([2, 3])), "class 0 comes 3 times and 2 times"),
        (one._replace(mean_level=5.0), "mean levels"),
        (one._replace(by_id=stale), "sample 1 differs by 50.0"),
    ):
        assert word in (loader.agree(one, other) or "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("speed",), "no question 'speed'"),
        (("noise", "--rounds", "0"), "--rounds 0"),
        (("noise", "--megabytes", "-1"), "--megabytes -1"),
        (("noise", "--megabytes", "1e9"), "give at most"),
        (("noise", "--frobnicate", "1"), "--frobnicate"),
        (("noise", "--dtype", "int8"), "int8"),
        (("loader",), "--manifest"),
        (("loader", "--batch", "0"), "--batch 0"),
        (("loader", "--image-size", "0"), "--image-size 0"),
        (("loader", "--workers", "-1"), "--workers -1"),
        (("loader", "--manifest", "no-such.manifest.json"), "data_prep shard"),
        (("loader", "--manifest", "README.md"), "manifest"),
    ],
)
def test_bad_options_are_refused(words, expected, tmp_path, capsys):
    output = () if words[0] == "speed" else ("--output", tmp_path / "new" / "x.jsonl")
    err = refused(capsys, *words, *output)
    assert expected in err
    if err.startswith("error:"):
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


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


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("NOISYNN_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        command.main(["loader", "--manifest", "no-such.manifest.json"])


def test_help_without_a_question(capsys):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "loader" in done.stdout and "noise" in done.stdout
    assert command.main([]) == 2
    with pytest.raises(SystemExit, match="0"):
        command.main(["loader", "--help"])
    assert "--manifest" in capsys.readouterr().out
