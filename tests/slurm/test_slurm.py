"""Jobs as a user submits them, on a real Slurm with two nodes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Digits
from tests.slurm.conftest import Cluster

SECRETS = {"HF_TOKEN": "hf-secret-1", "AWS_SECRET_ACCESS_KEY": "aws-secret-2", "DB_PASSWORD": "secret-3"}
TRAINING = ("--epochs", "5", "--evaluate-every-epochs", "5", "--log-every", "1", "--parallel.strategy", "zero1")
STEPS = 5 * (1397 // 64)


def submit(cluster: Cluster, *words: str) -> list[str]:
    """The numbers of the jobs that `python -m jobs slurm` has submitted."""
    cluster.environment |= SECRETS | {"OMP_NUM_THREADS": "1"}
    os.chdir(REPOSITORY)
    said = cluster.call(sys.executable, "-m", "jobs", "slurm", *words)
    return re.findall(r"\d+", re.search(r"submitted job (.*):", said)[1])


def train(cluster: Cluster, digits: Digits, run: Path) -> str:
    data = ("--train", str(digits.train), "--val", str(digits.val))
    size = ("--nodes", "2", "--gpus-per-node", "0", "--processes", "1", "--cpus-per-node", "1", "--time", "00:20:00")
    return submit(cluster, "demo", "--run", str(run), *data, *size, "--submit", "--", *TRAINING)[0]


def log_of(run: Path, job: str) -> str:
    return (run / "launch" / "1" / f"slurm-{job}.out").read_text()


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def weights_of(run: Path) -> str:
    newest = max((run / "checkpoints").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    return hashlib.sha256(newest.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / 'it\'s 100% "undisturbed"'
    job = train(cluster, digits, run)
    state = cluster.wait(job, 240)
    assert state == "COMPLETED", log_of(run, job)
    return run


def test_two_nodes_train_with_deepspeed(undisturbed: Path) -> None:
    results = json.loads((undisturbed / "results.json").read_text())
    assert (results["world_size"], results["strategy"], results["engine"]) == (2, "zero1", "DeepSpeedEngine")
    assert results["steps"] == STEPS


def test_what_was_submitted_lies_in_the_run_folder_and_no_secret_does(undisturbed: Path) -> None:
    launch = undisturbed / "launch" / "1"
    for name in ("pipeline/train.py", "jobs/torchrun.py", "pipeline/recipes/demo.py"):
        assert (launch / "code" / name).read_bytes() == (REPOSITORY / name).read_bytes()
    assert (launch / "commit.txt").read_text().startswith("commit ")
    files = [path for path in undisturbed.rglob("*") if path.is_file() and "code" not in path.parts]
    assert {"slurm.sh", "configuration.json", "commit.txt"} <= {path.name for path in files}
    for path in files:
        assert not any(value.encode() in path.read_bytes() for value in SECRETS.values()), path


def preempt(cluster: Cluster, job: str) -> None:
    other = cluster.call("sbatch", "--parsable", "-p", "high", "-N2", "--output=/dev/null", "--wrap", "sleep 1")
    assert cluster.wait(other, 120) == "COMPLETED"


def warn(cluster: Cluster, job: str) -> None:
    """As Slurm does where the time limit is near."""
    cluster.call("scancel", "--batch", "--signal=USR1", job)


@pytest.mark.soak
@pytest.mark.parametrize(("stop", "status"), [(preempt, 143), (warn, 138)])
def test_a_stopped_job_is_requeued_and_ends_with_the_same_weights(
    stop, status: int, cluster: Cluster, digits: Digits, tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "stopped"
    job = train(cluster, digits, run)
    cluster.until(lambda: steps_done(run) >= 10, 120, "10 steps")
    stop(cluster, job)
    cluster.until(lambda: cluster.field(job, "JobState") == "PENDING", 60, "the requeued job")
    assert not (run / "results.json").exists(), "too late: the run had ended before it was stopped"
    time.sleep(2)  # a node refuses a job that starts within the second in which it was requeued
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm holds it back for two minutes
    assert cluster.wait(job, 240) == "COMPLETED", log_of(run, job)
    assert cluster.field(job, "Restarts") == "1"
    log = log_of(run, job)
    saved = re.search(rf"saved at step (\d+) of {STEPS}", log)
    assert saved is not None and f"stopped with status {status}: requeued" in log, log
    assert json.loads((run / "results.json").read_text())["first_step"] == int(saved[1])  # no step lost
    assert weights_of(run) == weights_of(undisturbed)


def test_an_array_of_four_tasks_gives_the_bytes_of_one(cluster: Cluster, digits: Digits, tmp_path: Path) -> None:
    out = tmp_path / "shards of 4"
    launch = ("--launch-folder", str(tmp_path / "launch"), "--tasks", "4", "--cpus-per-node", "1", "--submit")
    source = ("--source", str(digits.pictures / "train"), "--out", str(out), "--samples-per-shard", "256")
    array, last = submit(cluster, "data_prep", *launch, "--", "shard", *source)
    logs = tmp_path / "launch" / "1"
    assert cluster.wait(last, 180) == "COMPLETED", "".join(path.read_text() for path in logs.glob("*.out"))
    assert len(list(logs.glob(f"slurm-{array}_*.out"))) == 4
    expected = {path.name: path.read_bytes() for path in digits.train.parent.glob("train-*")}
    assert len(expected) >= 6
    assert {path.name: path.read_bytes() for path in out.glob("train-*")} == expected
    manifest = json.loads((out / "train.manifest.json").read_text())
    assert manifest["shards"] == json.loads(digits.train.read_text())["shards"]
