"""Real ranks over gloo, by the command that a user gives: training, stopping, dying, going on, evaluating."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from warm import Running, WarmPython

STEPS = 6


def words(run: Path, digits, *options: str) -> list[str]:
    data = ("--data.train", str(digits.train), "--data.val", str(digits.val))
    return ["pipeline", "train", "demo", "--run", str(run), *data, "--epochs", "3", "--log-every", "1", *options]


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def two_ranks(command, digits, tmp_path_factory) -> tuple[Path, dict]:
    run = tmp_path_factory.mktemp("two") / "run"
    done = command(*words(run, digits, "--stop-after-steps", str(STEPS), "--checkpoint.every-steps", "2"))
    assert done.returncode == 0, done.stderr
    return run, json.loads((run / "results.json").read_text())


def test_two_ranks_run_deepspeed_together(two_ranks) -> None:
    results = two_ranks[1]
    assert (results["world_size"], results["strategy"]) == (2, "zero1")
    assert results["engine"] == "DeepSpeedEngine"
    assert results["noise"]["kind"] == "gaussian" and results["noise"]["strength"] > 0


def test_two_ranks_evaluate_each_picture_once(two_ranks, warm, digits, tmp_path) -> None:
    noise = ("--noise.kind", "optimal_q", "--noise.site", "blocks.5", "--noise.group-size", "7")
    what = ("pipeline", "evaluate", "--checkpoint", str(two_ranks[0]), "--data", str(digits.val), "--workers", "0")
    alone = warm.run(*what, *noise, "--output", str(tmp_path / "alone.json"))
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--")
    together = warm.run(*torchrun, *what, *noise, "--batch", "30", "--output", str(tmp_path / "together.json"))
    assert alone.returncode == together.returncode == 0, together.stderr
    found = [json.loads((tmp_path / f"{name}.json").read_text())["accuracies"] for name in ("alone", "together")]
    counts = ("protocol", "num_images", "correct_top1", "correct_top5", "class_mate_share", "near_ties")
    assert [[one[name] for name in counts] for one in found[0]] == [[one[name] for name in counts] for one in found[1]]
    assert [one["mean_loss"] for one in found[0]] == pytest.approx([one["mean_loss"] for one in found[1]], rel=1e-5)
    assert [accuracy["num_images"] for accuracy in found[0]] == [400] * 3


def test_another_run_is_not_taken_for_a_resume(two_ranks, digits) -> None:
    from pipeline.build import check
    from pipeline.recipes import load_recipe

    demo = load_recipe("demo").config
    data = replace(demo.data, train=str(digits.train), val=str(digits.val))
    same = replace(demo, run=two_ranks[0], epochs=3, data=data)
    check(same, 2)
    check(replace(same, log_every=7, parallel=replace(demo.parallel, strategy="ddp")), 1)
    for other, named in (
        (replace(same, global_batch=128), "global_batch was 64, is 128"),
        (replace(same, model=replace(demo.model, drop_path=0.1)), r"model.drop_path was 0.0, is 0.1"),
        (replace(same, data=replace(data, train=str(digits.val))), "holds other samples"),
        (replace(same, resume="never"), r"holds the run of step-00000006: leave out --resume never"),
        (replace(same, resume=str(two_ranks[0] / "checkpoints/step-1")), r"step-1.*no finished checkpoint"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=named):
            check(other, 2)


def test_torchrun_s_ranks_do_not_take_another_run_for_a_resume_either(two_ranks, warm, digits) -> None:
    before = (two_ranks[0] / "metrics.jsonl").read_bytes()
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--")
    done = warm.run(*torchrun, *words(two_ranks[0], digits, "--global-batch", "128"))
    assert done.returncode != 0 and "global_batch was 64, is 128" in done.stderr
    assert (two_ranks[0] / "metrics.jsonl").read_bytes() == before


def started(warm: WarmPython, run: Path, digits, *options: str) -> Running:
    """In the middle of its training."""
    running = warm.start("-m", *words(run, digits, *options))
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert running.poll() is None and time.monotonic() < deadline, "the run did not start"
        time.sleep(0.1)
    return running


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [("rank", 128 + signal.SIGKILL, "SIGKILL"), ("Ctrl-C", 128 + signal.SIGINT, "SIGINT")],
)
def test_a_lost_rank_and_an_interrupt_end_the_run_with_one_line(how, status, said, warm, digits, tmp_path) -> None:
    running = started(warm, tmp_path / "run", digits)
    ranks = psutil.Process(running.pid).children(recursive=True)
    (os.kill(ranks[-1].pid, signal.SIGKILL) if how == "rank" else os.killpg(running.pid, signal.SIGINT))
    _, error = running.communicate(timeout=60)
    assert running.returncode == status, error
    assert said in error and "Traceback" not in error and error.count("\n") == 1, error
    assert not psutil.wait_procs(ranks, timeout=10)[1], "a rank was left behind"


def test_a_stopped_rank_holds_nobody_longer_than_the_time_limit(warm, digits, tmp_path) -> None:
    """SIGSTOP: it answers to nothing, as in a driver's endless wait. The other shows where it waited."""
    running = started(warm, tmp_path / "run", digits, "--parallel.timeout-seconds", "5")
    ranks = psutil.Process(running.pid).children(recursive=True)
    stopped = time.monotonic()
    ranks[-1].suspend()
    _, error = running.communicate(timeout=60)
    assert time.monotonic() - stopped < 5 + 10
    assert running.returncode == 1 and "waited longer than parallel.timeout_seconds" in error
    assert "step.py" in error and "Thread 0x" in error, "the stacks are shown"
    assert not psutil.wait_procs(ranks, timeout=10)[1], "a rank was left behind"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_saves_and_the_same_command_goes_on_to_the_bit(
    number, two_ranks, warm, digits, tmp_path
) -> None:
    run = tmp_path / "run"
    running = started(warm, run, digits)
    running.send_signal(number)
    out, error = running.communicate(timeout=60)
    assert running.returncode == 128 + number, error
    assert number.name in error and "Traceback" not in error and error.count("\n") == 1, error
    saved = int(out.split("saved at step ")[1].split(" ")[0])
    assert max(losses(run)) == saved, "no step was lost"
    if number == signal.SIGUSR1:
        return  # what follows is the same
    done = warm.run(*words(run, digits, "--stop-after-steps", str(max(STEPS, saved + 2))))
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "results.json").read_text())["first_step"] == saved
    ours = losses(run)
    assert {step: ours[step] for step in range(1, STEPS + 1)} == losses(two_ranks[0])
