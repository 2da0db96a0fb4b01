"""Kubernetes files against the published schemas, and the containers' commands run as they stand, on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.conftest import REPOSITORY, Command, Digits

CLAIM = ("--image", "registry.example/noisynn:1", "--volume-claim", "imagenet")
LARGE = ("--memory", "200Gi", "--cpus-per-node", "64", "--namespace", "ml", "--secret", "s3", "--work-folder", "/src")
PATHS = ("--run", "/data/runs/A_b", "--train", "/data/in 1k/t.json", "--val", "/data/in 1k/v.json")
TRAINING = ("demo", *PATHS, "--nodes", "4", "--gpus-per-node", "8", *CLAIM)
WORDS = {
    "training": TRAINING,
    "training, all options": (*TRAINING, *LARGE, "--", "--note", 'it\'s "so" $(HOME) $$ é'),
    "training on CPUs": ("demo", *PATHS, "--gpus-per-node", "0", "--processes", "2", *CLAIM),
    "data_prep": (
        "data_prep",
        "--tasks",
        "4",
        "--launch-folder",
        "l",
        *CLAIM,
        *LARGE,
        "--",
        "shard",
        "--out",
        "/data/o",
    ),
    "data_prep, one task": ("data_prep", "--launch-folder", "l", *CLAIM, "--", "verify", "/data/o/train.manifest.json"),
    "benchmarks": (
        "benchmarks",
        "--gpus",
        "1",
        "--launch-folder",
        "l",
        *CLAIM,
        "--",
        "noise",
        "--output",
        "/data/n.jsonl",
    ),
}


def documents(command: Command, *words: str) -> list[dict[str, Any]]:
    done = command("jobs", "kubernetes", *words, HF_TOKEN="hf-secret-1", AWS_SECRET_ACCESS_KEY="aws-secret-2")
    assert done.returncode == 0, done.stderr
    assert "-secret-" not in done.stdout
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("what", WORDS)
def test_the_published_schemas_accept_every_file(what: str, command: Command) -> None:
    found = documents(command, *WORDS[what])
    assert [document["kind"] for document in found] == (["Service"] if "training" in what else []) + ["Job"]
    for version in ("1.27", "1.37"):
        for document in found:
            kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_refuse_what_is_wrong(command: Command) -> None:
    job = documents(command, *WORDS["training"])[1]
    job["spec"]["completionMod"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)


def container_of(job: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The one pod's command, as Kubernetes expands it, and its environment."""
    container = job["spec"]["template"]["spec"]["containers"][0]
    index = "$(JOB_COMPLETION_INDEX)"
    command = [word.replace("$$", "\0").replace(index, "0").replace("\0", "$") for word in container["command"]]
    return command, {item["name"]: item["value"] for item in container["env"]}


def test_a_training_containers_command_runs_as_it_stands(command: Command, digits: Digits, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "A_b"
    data = ("--train", str(digits.train), "--val", str(digits.val), "--mount-path", str(Path(digits.train).parents[2]))
    size = ("--gpus-per-node", "0", "--processes", "2", "--python", sys.executable)
    options = ("--", "--stop-after-steps", "2", "--parallel.strategy", "zero1")
    job = documents(command, "demo", "--run", str(run), *data, *size, *CLAIM, *options)[1]
    words, environment = container_of(job)
    host = f"{job['metadata']['name']}-0.{job['spec']['template']['spec']['subdomain']}"  # as the Service names the pod
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost {host}\n")
    bind = ["unshare", "--mount", "bash", "-c", 'mount --bind "$1" /etc/hosts && shift && exec "$@"', "bash"]
    probe = subprocess.run([*bind, str(tmp_path / "hosts"), "true"], check=False, capture_output=True, text=True)
    if shutil.which("unshare") is None or probe.returncode:
        pytest.skip(f"no right to mount a file of hosts: {probe.stderr.strip()}")
    done = subprocess.run(
        [*bind, str(tmp_path / "hosts"), *words],
        cwd=REPOSITORY,
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "results.json").read_text())
    assert (results["steps"], results["world_size"], results["strategy"]) == (2, 2, "zero1")


def test_data_preps_containers_write_the_bytes_of_one_task(command: Command, digits: Digits, tmp_path: Path) -> None:
    out = tmp_path / "it's out"
    source = (
        "--source",
        str(digits.pictures / "val"),
        "--split",
        "val",
        "--out",
        str(out),
        "--samples-per-shard",
        "256",
    )
    pods = ("--tasks", "2", "--launch-folder", "l", "--python", sys.executable, *CLAIM)
    words, environment = container_of(documents(command, "data_prep", *pods, "--", "shard", *source)[0])

    def start(index: int) -> subprocess.Popen[bytes]:
        own = {"JOB_COMPLETION_INDEX": str(index), "JOIN_SECONDS": "0.2"}
        return subprocess.Popen(words, cwd=REPOSITORY, env=os.environ | environment | own, stderr=subprocess.PIPE)

    first, second = start(0), start(1)
    assert second.wait(timeout=60) == 0
    assert first.wait(timeout=60) == 0  # joins both
    expected = {path.name: path.read_bytes() for path in digits.val.parent.glob("val-*")}
    assert len(expected) == 4 and {path.name: path.read_bytes() for path in out.glob("val-*")} == expected
    assert (out / "val.manifest.json").is_file()
