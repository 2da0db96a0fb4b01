"""benchmarks train: a small real run of two ranks, aims beside figures by hand, and bad input."""

from __future__ import annotations

import shlex

import pytest
from benchmark_runs import quiet, refused

from benchmarks import __main__ as command
from benchmarks import train
from benchmarks.harness import Contestant, Row, Timing, read_rows, summarise
from benchmarks.train import AIMS, TrainOptions, findings, print_findings
from benchmarks.train_ranks import Job, same_start

SMALL = shlex.split("--model test_vit --image-size 32 --batch 4 --steps 2 --rounds 1")


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    quiet(monkeypatch)
    monkeypatch.setattr(train, "TIMES", 1)


def words(output, *more) -> list[str]:
    return ["train", "--output", str(output), *SMALL, *more]


def test_two_ranks_are_measured(tmp_path, capsys):
    output = tmp_path / "train.jsonl"
    models = ("test_vit", "test_vit2")
    assert command.main(words(output, "--engines", "bare ddp", "trainer ddp", "--checkpoint-models", *models)) == 0
    rows = read_rows(output)
    by_name = {(row["part"], row["contestant"]): row for row in rows if row["part"] != "aims"}
    assert [name for part, name in by_name if part != "plan"] == [
        *("bare ddp", "trainer ddp"),
        *("resume at 1 %", "resume at 99 %"),
        *("bare copy", "save") * 2,
    ]
    bare, trainer = by_name["step", "bare ddp"], by_name["step", "trainer ddp"]
    assert bare["timings"][0]["items"] == trainer["timings"][0]["items"] == 2 * 2 * 4
    assert "step 1 of 174" in by_name["resume", "resume at 1 %"]["settings"]
    assert "step 172 of 174" in by_name["resume", "resume at 99 %"]["settings"]
    assert {by_name[f"checkpoint, {model}", "save"]["n"] for model in models} == {3}
    aims = {row["what"]: row for row in rows if row["part"] == "aims"}
    measured, plan = list(aims)[:-1], list(aims)[-1]
    assert measured == [
        "step: trainer ddp over bare ddp",
        "resume: resume at 99 % over resume at 1 %",
        *(f"checkpoint, {model}: save over bare copy" for model in models),
    ]
    assert plan.startswith("plan: ") and aims[plan]["at_most"] == 0.05
    over = trainer["wall_seconds"]["median"] / bare["wall_seconds"]["median"]
    assert aims["step: trainer ddp over bare ddp"]["measured"]["median"] == pytest.approx(over)
    assert aims["step: trainer ddp over bare ddp"]["at_most"] == 1.03
    assert all(row["environment"]["torch"] and row["command"].startswith("python") for row in rows)
    text = capsys.readouterr().out
    assert "at most 1.03" in text and "train: aims" in text


@pytest.mark.soak
def test_every_engine_is_measured(tmp_path):
    output = tmp_path / "train.jsonl"
    engines = (*TrainOptions().engines, "trainer zero3")
    assert command.main(words(output, "--parts", "step", "--engines", *engines)) == 0
    assert [row["contestant"] for row in read_rows(output) if row["part"] == "step"] == list(engines)


def rows_of(part: str, seconds: dict[str, list[float]]) -> list[Row]:
    contestants = [Contestant(name, lambda: 1, "") for name in seconds]
    timings = [
        Timing(name, number, 10, value, 2 * value)
        for name, values in seconds.items()
        for number, value in enumerate(values, start=1)
    ]
    return summarise("train", part, "images", contestants, timings)


def test_ratios_are_of_time_and_formed_turn_by_turn(capsys):
    rows = rows_of("step", {"bare ddp": [1.0, 2.0, 4.0], "trainer ddp": [1.02, 2.1, 4.0]})
    rows += rows_of("checkpoint, a model", {"bare copy": [0.001] * 3, "save": [0.002, 0.0016, 0.0018]})
    rows += rows_of("plan", {"all, start": [0.03] * 3, "all, 99 %": [0.04, 0.02, 0.06]})
    step, save, plan = findings(rows)
    assert save.what == "checkpoint, a model: save over bare copy"
    assert step.measured == pytest.approx((1.02, 1.0, 1.05)) and step.cpu == pytest.approx((1.02, 1.0, 1.05))
    assert save.measured == pytest.approx((1.8, 1.6, 2.0)) and save.cpu is None  # too short for the clock's ticks
    assert plan.what == "plan: all, 99 %, the slowest" and plan.measured == (0.04, 0.02, 0.06)
    print_findings([step, save, plan])
    lines = capsys.readouterr().out.splitlines()
    assert [("NOT met" in line) for line in lines if "at most" in line] == [False, True, False]


def test_each_aim_is_of_contestants_that_there_are():
    engines = TrainOptions().engines
    assert {name for aim in AIMS if aim.part == "step" for name in aim[1:3]} == set(engines)


def test_contestants_that_start_elsewhere_are_noticed():
    assert same_start(2.3, 2.30001) is None
    assert "2.30000 and 2.31000" in same_start(2.3, 2.31)
    assert "nan" in same_start(2.3, float("nan"))


def test_a_job_comes_back_as_it_was_written(tmp_path):
    options = TrainOptions()
    job = train.job_of(options, ("step",), tmp_path / "shards", tmp_path)
    assert Job.read(job.write(tmp_path / "job.json")) == job
    config = job.config("a", 2, "zero1")
    assert (config.global_batch, config.micro_batch, config.parallel.strategy) == (64, 32, "zero1")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--engines", "zero1"], "--engines 'zero1': name such as 'bare ddp'"),
        (["--engines", "bare zero3"], "--engines 'bare zero3'"),
        (["--ranks", "0"], "--ranks 0: at least 1"),
        (["--parts", "speed"], "'speed' is none of step"),
        (["--model", "vit_tiny_patch99"], "unknown to timm"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, more, said):
    assert said in refused(capsys, *words(tmp_path / "out.jsonl", *more))


def test_a_rank_s_reason_comes_back(tmp_path, monkeypatch):
    job = train.job_of(TrainOptions(), ("step",), tmp_path, tmp_path)
    said = "a warning\n[rank1] error: the disk is full; free 3 MB\nTraceback"
    monkeypatch.setattr(train, "_stderr_of", lambda words, environment: said)
    with pytest.raises(ValueError, match=r"the ranks of step failed: .*error: the disk is full; free 3 MB$"):
        train.run_ranks(job, 2)


def test_with_a_device_it_is_about_steps_on_one(capsys):
    assert "tpu" in refused(capsys, "train", "--device", "tpu")
    with pytest.raises(SystemExit):
        command.main(["train", "--device", "cuda", "--help"])
    assert "timm's model, this project's clean and noisy" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(SystemExit):
        command.main(["train", "--help"])
    assert "--engines" in capsys.readouterr().out
