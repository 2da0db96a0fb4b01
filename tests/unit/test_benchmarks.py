"""python -m benchmarks as a user runs it: small real runs of each question, and bad input."""

import json
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import loader, machine_code, noise, noise_contestants, noise_step, samples
from benchmarks.harness import Contestant, Row, Timing, read_rows, summarise
from benchmarks.loader import Delivered
from benchmarks.noise_contestants import agree
from data_prep.beton import BetonOptions, write_beton
from data_prep.distribute import ShardOptions, shard


@dataclass(frozen=True)
class Nothing:
    """A question without options."""


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
    except SystemExit as error:
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


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile without a C++ compiler's seconds: the README's test has those."""
    quick = partial(torch.compile, backend="aot_eager", dynamic=False)
    monkeypatch.setattr(noise_contestants, "compiled", quick)


KINDS = ("gaussian", "salt_and_pepper", "circular_shift", "optimal_q")


def test_the_noises_are_measured_and_a_second_run_goes_on(tmp_path, capsys, quick_compiler, monkeypatch):
    monkeypatch.setattr(machine_code, "costs", cache(machine_code.costs))  # seconds, twice
    output = tmp_path / "noise.jsonl"
    words = ["noise", "--megabytes", "1", "--rounds", "1", "--device", "cpu", "--output", str(output)]
    assert command.main([*words, "--parts", *KINDS]) == 0
    text = capsys.readouterr().out
    assert "the specification" in text and "not fast code" in text
    assert command.main(words) == 0
    text = capsys.readouterr().out
    assert "has 4 of 10 cells already" in text
    assert all(f"noise: {kind}" in text for kind in KINDS)  # what is kept is shown again
    rows = read_rows(output)
    last = rows.pop(4 * 6) if rows[4 * 6]["part"] == "machine code" else None
    norms = [f"norm_noise, {kind}{way}" for kind in ("gaussian", "optimal_q") for way in ("", ", and back")]
    assert [(row["part"], row["contestant"]) for row in rows] == [
        (kind, name) for kind in KINDS for name in ("eager", "reference", "torch.compile", "operator", "clone", "copy")
    ] + [("image_noise, gaussian", name) for name in ("eager", "torch.compile", "operator")] + [
        ("channels_last, gaussian", name) for name in ("eager", "torch.compile", "operator", "clone", "copy")
    ] + [(part, name) for part in norms for name in ("eager", "torch.compile", "operator", "LayerNorm alone")]
    assert rows[0]["conditions"]["shape"] == [8, 197, 768]
    for row in rows:
        rate, moved = row["items_per_second"]["median"], row["gigabytes_per_second"]["median"]
        bytes_moved = 5 if row["part"].startswith("image") else 20 if row["part"].endswith("back") else 8
        assert moved == pytest.approx(1e-9 * bytes_moved * rate)
    if last is not None:  # where there is no compiler for GPUs there is no code to count
        assert {"gaussian", "optimal_q"} <= {kernel["kernel"] for kernel in last["kernels"]}


def test_ratios_are_the_operators_turn_by_turn(capsys):
    seconds = {"eager": (8.0, 4.0), "operator": (2.0, 2.0), "copy": (1.0, 1.0)}
    contestants = [Contestant(name, lambda: 1, "") for name in seconds]
    timings = [Timing(name, turn, 1, own[turn], 1.0) for turn in (0, 1) for name, own in seconds.items()]
    rows = summarise("noise", "gaussian", "elements", contestants, timings)
    noise._print_ratios([Row.from_json(json.loads(row.to_json({}))) for row in rows])
    text = capsys.readouterr().out
    assert "3 (2 to 4)" in text and "0.5 (0.5 to 0.5)" in text
    noise._print_ratios(rows[:1])  # a part without an operator
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "channels_last"), [*((kind, False) for kind in KINDS), ("gaussian", True)])
def test_eager_noises_do_the_references_work_and_another_strength_is_noticed(kind, dtype, channels_last):
    x = noise._filled((16, 64, 14, 14) if channels_last else (8, 197, 768), dtype, torch.device("cpu"))
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    contestants = {contestant.name: contestant for contestant in noise_contestants.contestants_of(kind, x)}
    eager, reference, copy = (contestants[name] for name in ("eager", "reference", "copy"))
    assert agree(eager.output(), contestants["operator"].output()) is None
    assert copy.output is None and eager.output is not None and reference.output is not None
    made = eager.output()
    assert agree(made, reference.output()) is None
    weaker = made._replace(noisy=x + 0.9 * (made.noisy - x))
    assert agree(made, weaker) is not None


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", noise.NORMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_noise_is_compared_with_what_it_replaces(kind, dtype, backward, quick_compiler):
    x = noise._filled((8, 197, 768), dtype, torch.device("cpu"))
    by_name = {c.name: c for c in noise_contestants.norm_contestants(kind, x, backward)}
    made = {name: contestant.output() for name, contestant in by_name.items() if contestant.output is not None}
    assert list(made) == ["eager", "torch.compile", "operator"]
    assert all(agree(one, other) is None for one, other in combinations(made.values(), 2))
    one = made["operator"]
    # Noise that is left out, or a gradient that is off by a hundredth, is another work.
    other = one._replace(noisy=one.x if one.random else one.noisy * 1.1)
    assert agree(made["eager"], other) is not None
    assert by_name["LayerNorm alone"].round() == x.numel()


def test_a_models_step_is_taken_with_noise_and_without(monkeypatch):
    monkeypatch.setattr(noise_step, "STEPS", 2)
    small = noise_step.step_contestants(8, torch.device("cpu"), "test_vit", compiled=False)
    assert [contestant.name for contestant in small] == ["none", "gaussian", "optimal_q"]
    for contestant in small:
        assert contestant.round() == 16
        step = contestant.round.func.__self__
        assert step.steps_done == 2
        assert len(step.injector.sites) == (0 if contestant.name == "none" else len(step.model.blocks))


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
        (("noise", "--parts", "gaussian", "noise"), "--parts"),
        (("noise", "--parts", "gaussian", "gaussian"), "each once"),
        (("noise", "--parts", "model", "--device", "cpu"), "on a GPU alone"),
        (("noise", "--minutes", "0"), "--minutes 0"),
        (("noise", "--batch", "0"), "--batch 0"),
        (("train", "--rounds", "0"), "--rounds 0"),
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


def test_the_status_says_what_happened(monkeypatch, capsys):
    """1 where a test of draws has failed; a library that is missing is named."""
    for name, passed in (("right", True), ("wrong", False)):
        rows = [SimpleNamespace(passed=True), SimpleNamespace(passed=passed), {"no": "test"}]
        module = SimpleNamespace(Options=Nothing, measure=lambda options, command, rows=rows: rows)
        monkeypatch.setitem(sys.modules, f"a_question_{name}", module)
        monkeypatch.setitem(command._QUESTIONS, name, command.Question(f"a_question_{name}", "Options", "measure", ""))
    assert (command.main(["right"]), command.main(["wrong"])) == (0, 1)
    monkeypatch.setitem(command._QUESTIONS, "odd", command.Question("no_such_library", "", "", ""))
    assert refused(capsys, "odd") == "error: No module named 'no_such_library'; `make setup` installs it\n"


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
