"""What a run writes on request, and how it ends where its time does: one start with everything on, and one cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS = 14  # of 64 samples


@pytest.fixture(scope="module")
def run(warm, digits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("options") / "run"
    data = ("--data.train", str(digits.train), "--data.val", str(digits.val))
    what = ("--micro-batch", "auto", "--samples", str(64 * STEPS + 63), "--optim.ema-decay", "0.9", "--ledger")
    more = ("--histograms", "--profile-steps", "2", "--log-every", "5", "--optim.warmup-samples", "128")
    one = ("--parallel.strategy", "auto", "--parallel.processes", "1", "--optim.warmup-epochs", "0")
    done = warm.run("pipeline", "train", "demo", "--run", str(folder), *data, *what, *more, *one)
    assert done.returncode == 0, done.stderr
    assert "micro_batch auto: 64 pictures fit on each rank" in done.stdout
    assert "strategy ddp: the state takes" in done.stdout, "auto says why"
    return folder


def test_the_length_is_given_in_samples(run) -> None:
    results = json.loads((run / "results.json").read_text())
    assert (results["steps"], results["strategy"], results["skipped_steps"]) == (STEPS, "ddp", 0)


def test_tensorboard_has_scalars_pictures_and_histograms(run) -> None:
    events = EventAccumulator(str(run), size_guidance={"histograms": 0}).Reload()
    tags = events.Tags()
    assert {"train/loss", "train/grad_norm", "train/lr", "train/skipped_steps"} <= set(tags["scalars"])
    assert {"val/top1", "val_ema/top1"} <= set(tags["scalars"])
    assert "input/step_0" in tags["images"] and "weights/blocks.0.attn.qkv.weight" in tags["histograms"]
    rates = [event.value for event in events.Scalars("train/lr")]
    assert len(rates) == 3 and max(rates) < 2e-3 + 1e-9 and rates[-1] < rates[0]


def test_the_ledger_has_each_sample_of_each_step(run) -> None:
    from pipeline.data.order import Order
    from pipeline.ledger import read_ledger

    found = read_ledger(run)
    assert list(found) == list(range(1, STEPS + 1))
    expected = Order(1397, 0).ids(0, 0, 64 * STEPS).tolist()
    assert [i for ids in found.values() for i in ids] == expected


def test_the_trace_opens(run) -> None:
    trace = json.loads((run / "profile" / "rank-00000.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])


def test_the_average_is_evaluated_and_exported_too(run, warm, digits, tmp_path) -> None:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in logged if "val_ema/top1" in line]
    done = warm.run(
        *("pipeline", "evaluate", "--checkpoint", str(run), "--data", str(digits.val), "--ema"),
        *("--workers", "0", "--output", str(tmp_path / "ema.json")),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "ema.json").read_text())["accuracies"][0]["top1"] == last["val_ema/top1"]


def test_a_run_whose_time_is_over_saves_and_says_so(warm, digits, tmp_path) -> None:
    data = ("--data.train", str(digits.train), "--data.val", str(digits.val))
    alone = ("--parallel.strategy", "ddp", "--parallel.processes", "1", "--walltime-minutes", "0.1")
    done = warm.run("pipeline", "train", "demo", "--run", str(tmp_path), "--epochs", "1000", *data, *alone)
    assert done.returncode == 138, done.stderr
    saved = int(done.stdout.split("saved at step ")[1].split(" ")[0])
    assert saved > 0 and (tmp_path / "checkpoints" / f"step-{saved:08d}" / "SHA256SUMS").is_file()
