"""python -m benchmarks as a user runs it: small real runs of each question, and bad input."""

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_runs import quiet, refused

from benchmarks import __main__ as command
from benchmarks import machine_code, noise, noise_contestants, noise_step
from benchmarks.harness import Contestant, Row, Timing, read_rows, summarise
from benchmarks.noise_contestants import agree


@dataclass(frozen=True)
class Nothing:
    """A question without options."""


REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    quiet(monkeypatch)


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
    ] + [("image_noise, gaussian", name) for name in ("eager", "torch.compile", "operator", "copy")] + [
        ("channels_last, gaussian", name) for name in ("eager", "torch.compile", "operator", "clone", "copy")
    ] + [
        (part, name)
        for part in norms
        for name in ("eager", "torch.compile", "operator", "LayerNorm alone", "LayerNorm compiled", "copy")
        if name != "copy" or "back" not in part
    ]
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


@pytest.mark.parametrize(("dtype", "bytes_per_value"), [(torch.float32, 5), (torch.bfloat16, 3)])
def test_pictures_are_compared_with_a_copy_that_moves_as_many_bytes(dtype, bytes_per_value, quick_compiler):
    """One byte of a value is read, the rest written; the copy reads its source and writes as much."""
    by_name = {c.name: c for c in noise_contestants.image_contestants(8, dtype, torch.device("cpu"))}
    assert list(by_name) == ["eager", "torch.compile", "operator", "copy"]
    values = 8 * 3 * 224 * 224
    copy, source = by_name["copy"], by_name["copy"].round.args[0].args[0]
    assert 2 * source.nbytes == values * bytes_per_value and copy.output is None
    assert [c.bytes_per_item for c in by_name.values()] == [bytes_per_value] * 4
    assert copy.round() == by_name["operator"].round() == values


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
        (("loader", "--parts", "epoch", "epoch"), "each once"),
        (("loader", "--contestants", "tars", "dali"), "--contestants"),
        (("loader", "--manifest", "README.md", "--pictures", "256"), "--short-side 256"),
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
