"""python -m data_prep as a user runs it: subprocesses, exit statuses, one message, nothing half-written."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.manifest import read_manifest

REPOSITORY = Path(__file__).resolve().parents[2]


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "data_prep", *map(str, arguments)]


def run(*arguments, **environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


def make_source(root: Path, per_class: int = 3, side: int = 24) -> Path:
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            coarse = np.random.RandomState(i).randint(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((side, side)).save(root / name / f"{i}.jpg")
    return root


@pytest.fixture
def source(tmp_path) -> Path:
    return make_source(tmp_path / "source")


def left_over(folder: Path) -> list[str]:
    """Everything under a final or temporary name of the writer's."""
    found = (p for p in folder.rglob("*") if p.is_file()) if folder.exists() else ()
    return sorted(p.name for p in found if p.suffix in (".tar", ".idx", ".tmp", ".beton") or "manifest" in p.name)


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    flat = " ".join(line.strip("│ ") for line in result.stderr.splitlines())  # tyro draws a box around its own
    for word in words:
        assert word in flat, (word, result.stderr)
    if result.stderr.startswith("error:"):
        assert result.stderr.count("\n") == 1


def _empty_class(source: Path) -> None:
    (source / "empty").mkdir()


def _root_of_splits(source: Path) -> None:
    (source / "ant").rename(source / "train")
    (source / "bee").rename(source / "val")


def _no_classes(source: Path) -> None:
    for path in sorted(source.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _write(name: str, data: bytes):
    return lambda source: (source / name).write_bytes(data)


def _too_large(source: Path) -> None:
    Image.new("1", (9000, 6000)).save(source / "ant" / "large.png")


def _truncated(source: Path) -> None:
    path = source / "bee" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda source: source.rename(source.parent / "gone"), ("source", "does not exist", "name a folder")),
        (_empty_class, ("empty", "holds no pictures")),
        (_root_of_splits, ("holds splits", "--source", "train")),
        (_no_classes, ("no class folders",)),
        (_write("ant/notes.txt", b"hello"), ("ant/notes.txt", "no picture by its name", "remove")),
        (_write("stray.jpg", b"hello"), ("stray.jpg", "beside the class folders")),
        (_write("ant/9.jpg", b"hello"), ("ant/9.jpg", "not a picture", "--on-error skip")),
        (_write("ant/9.jpg", b""), ("ant/9.jpg", "empty")),
        (_truncated, ("bee/1.jpg", "truncated", "--on-error skip")),
        (_too_large, ("ant/large.png", "9000x6000", "--max-megapixels")),
    ],
)
def test_bad_sources_are_refused(source, tmp_path, spoil, words):
    spoil(source)
    assert_refused(run("shard", "--source", source, "--out", tmp_path / "out"), *words)
    assert left_over(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("shard", "--source", "a", "--out", "b", "--samples-per-shard", "0"), ("--samples-per-shard 0", "at least 1")),
        (("shard", "--source", "a", "--out", "b", "--frobnicate", "1"), ("--frobnicate",)),
        (("shard", "--source", "a", "--out", "b", "--split", "a/b"), ("--split 'a/b'",)),
        (("beton", "x", "--max-resolution", "9", "--jpeg-quality", "101"), ("--jpeg-quality 101",)),
        (("beton", "no-such.manifest.json"), ("no-such.manifest.json", "data_prep shard")),
        (("verify", "README.md"), ("README.md", "manifest")),
    ],
)
def test_bad_options_are_refused(arguments, words):
    assert_refused(run(*arguments), *words)


def test_other_bad_options_are_refused():
    """The rest of the ranges, without a process each."""
    from data_prep.beton import BetonOptions
    from data_prep.distribute import ShardOptions
    from data_prep.verify import VerifyOptions

    shard = {"source": Path("a"), "out": Path("b")}
    for kind, fixed, option, value in [
        (ShardOptions, shard, "seed", -1),
        (ShardOptions, shard, "processes", 0),
        (ShardOptions, shard, "split", ""),
        (BetonOptions, {"manifest": Path("a")}, "max_resolution", 0),
        (BetonOptions, {"manifest": Path("a"), "max_resolution": 9}, "jpeg_quality", 0),
        (BetonOptions, {"manifest": Path("a")}, "jpeg_quality", 90),  # which nothing would read
        (BetonOptions, {"manifest": Path("a"), "max_resolution": 9, "mode": "raw"}, "jpeg_quality", 90),
        (BetonOptions, {"manifest": Path("a")}, "processes", 0),
        (VerifyOptions, {"manifest": Path("a")}, "processes", 0),
    ]:
        with pytest.raises(ValueError, match="--" + option.replace("_", "-")):
            kind(**fixed, **{option: value})


def assert_digits_are_scikit_learn_s(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for digit in range(10):
        val, train = (sorted(int(p.stem) for p in (folder / s / str(digit)).iterdir()) for s in ("val", "train"))
        assert len(val) == 40
        assert sorted(val + train) == np.nonzero(digits.target == digit)[0].tolist()
        gaps = np.diff(np.searchsorted(sorted(val + train), val))
        assert gaps.min() >= 4 and gaps.max() <= 5  # about 180 of each class, every 4.5th in val
        image = Image.open(folder / "train" / str(digit) / f"{train[5]:04d}.jpg")
        assert (image.size, image.format) == ((32, 32), "JPEG")
        small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).astype(float)
        assert np.corrcoef(small.ravel(), digits.images[train[5]].ravel())[0, 1] > 0.95


def test_from_digits_to_verified_shards(tmp_path):
    assert "1797 pictures" in run("digits", "--out", tmp_path / "digits").stdout
    assert_digits_are_scikit_learn_s(tmp_path / "digits")
    assert "already there" in run("digits", "--out", tmp_path / "digits").stdout
    (tmp_path / "digits" / "train" / "0" / "0010.jpg").unlink()
    assert_refused(run("digits", "--out", tmp_path / "digits"), "does not hold the digits", "remove it")
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]
    out = tmp_path / "out"
    done = run("shard", "--source", tmp_path / "digits" / "val", "--split", "val", "--out", out, "--processes", "1")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("val: 400 pictures, 10 classes, 1 shards") and done.stdout.count("\n") == 1
    assert read_manifest(out / "val.manifest.json").class_counts == (40,) * 10
    sound = run("verify", out / "val.manifest.json")
    assert (sound.returncode, sound.stderr) == (0, "") and "0 faults" in sound.stdout
    with open(out / "val-000000.tar", "r+b") as file:
        file.seek(100_000)
        file.write(b"!")
    broken = run("verify", out / "val.manifest.json", "--quick")
    assert broken.returncode == 1
    assert broken.stdout.startswith("fault: val-000000.tar: its sha256")


def test_the_traceback_can_be_had(tmp_path):
    result = run("verify", tmp_path / "none", NOISYNN_TRACEBACK="1")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_a_killed_writer_leaves_whole_shards_only_and_goes_on(tmp_path):
    source = make_source(tmp_path / "source", per_class=30, side=200)
    arguments = ("shard", "--source", source, "--samples-per-shard", 5, "--processes", 1, "--out")
    assert run(*arguments, tmp_path / "whole").returncode == 0
    expected = read_manifest(tmp_path / "whole" / "train.manifest.json")
    sha256 = {shard.name: shard.sha256 for shard in expected.shards}

    out = tmp_path / "out"
    for how, enough in ((signal.SIGTERM, 2), (signal.SIGKILL, 5)):
        process = subprocess.Popen(command(*arguments, out), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.tar"))) < enough and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and "Traceback" not in errors
        assert enough <= len(list(out.glob("*.tar"))) < len(expected.shards), "killed too late to tell anything"
        assert not (out / "train.manifest.json").exists()
        assert how == signal.SIGKILL or not list(out.rglob("*.tmp"))
        for path in out.glob("*.tar"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256[path.name]
            with tarfile.open(path) as tar:
                assert len(tar.getnames()) == 10

    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if path.with_suffix(".idx").exists()}
    assert run(*arguments, out).returncode == 0
    assert (out / "train.manifest.json").read_bytes() == (tmp_path / "whole" / "train.manifest.json").read_bytes()
    # At most the shard that was open is done again.
    assert sum(path.stat().st_mtime_ns != time_before for path, time_before in kept.items()) <= 1


def test_a_summary_for_scripts(source, tmp_path):
    (source / "ant" / "9.png").write_bytes(_png())
    (source / "bee" / "9.jpg").write_bytes(b"no picture")
    done = run("shard", "--source", source, "--out", tmp_path / "out", "--on-error", "skip", "--json")
    assert done.returncode == 0 and "bee/9.jpg: is not a picture" in done.stderr
    summary = json.loads(done.stdout)
    assert (summary["images"], summary["shards"], summary["classes"]) == (7, 1, 2)
    assert summary["repaired"] == {"PNG, mode RGB": 1} and summary["skipped"] == {"is not a picture": 1}
    assert summary["seconds"] > 0 and summary["images_per_second"] > 0 and summary["megabytes_per_second"] > 0
    path = tmp_path / "out" / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-1])
    done = run("verify", tmp_path / "out" / "train.manifest.json", "--json")
    assert done.returncode == 1
    assert any("train-000000.tar" in fault for fault in json.loads(done.stdout)["faults"])


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24)).save(buffer, "PNG")
    return buffer.getvalue()


def test_tasks_of_a_slurm_array_and_their_end(source, tmp_path):
    out = tmp_path / "out"
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    arguments = ("shard", "--source", source, "--out", out, "--samples-per-shard", 2)
    first = run(*arguments, **array, SLURM_ARRAY_TASK_ID="0")
    assert first.returncode == 0 and f"python -m data_prep finalize --out {out} --split train" in first.stdout
    assert_refused(run("finalize", "--out", out), "1 of 3 shards", "train-000001.tar")
    assert run(*arguments, **array, SLURM_ARRAY_TASK_ID="1").returncode == 0
    end = run("finalize", "--out", out)
    assert end.returncode == 0 and "6 pictures, 2 classes, 3 shards" in end.stdout
    assert "0 faults" in run("verify", out / "train.manifest.json").stdout


def test_foreign_tars_are_indexed_looked_at_and_counted(source, tmp_path):
    assert run("shard", "--source", source, "--out", tmp_path / "own").returncode == 0
    (tmp_path / "tars").mkdir()
    (tmp_path / "own" / "train-000000.tar").rename(tmp_path / "tars" / "a.tar")
    bare = run("index", tmp_path / "tars" / "a.tar")
    assert bare.returncode == 0 and "index --hash" in bare.stdout
    assert run("verify", tmp_path / "tars" / "train.manifest.json").returncode == 1
    assert run("index", tmp_path / "tars", "--hash").returncode == 0
    assert "0 faults" in run("verify", tmp_path / "tars" / "train.manifest.json").stdout
    sheet = run("inspect", tmp_path / "tars" / "a.tar", "--output", tmp_path / "sheet.png")
    assert sheet.returncode == 0 and "6 pictures" in sheet.stdout
    assert Image.open(tmp_path / "sheet.png").format == "PNG"
    counted = run("stats", tmp_path / "tars" / "train.manifest.json", "--json")
    assert counted.returncode == 0, counted
    assert json.loads(counted.stdout)["splits"][0]["name"] == "train"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("shard", "--source", "a", "--out", "b", "--max-side", "9", "--short-side", "9"), ("exclude one another",)),
        (
            ("shard", "--source", "a", "--out", "b", "--jpeg-quality", "80"),
            ("--jpeg-quality 80", "would change nothing"),
        ),
        (("shard", "--source", "a", "--out", "b", "--task", "2"), ("--task 2", "--num-tasks")),
        (("shard", "--source", "nostore://a", "--out", "b"), ("nostore://a", "URL that fsspec knows")),
        (("finalize", "--out", "no-such-folder"), ("no-such-folder", "run `shard` first")),
        (("index", "no-such.tar"), ("no-such.tar", "name WebDataset tars")),
        (("inspect", "no-such.tar"), ("no-such.tar",)),
        (("stats", "no-such.manifest.json"), ("no-such.manifest.json",)),
    ],
)
def test_more_bad_options_are_refused(arguments, words, tmp_path):
    assert_refused(run(*arguments), *words)
    assert not (REPOSITORY / "b").exists()
