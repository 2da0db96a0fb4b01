"""torchrun with statuses that say why, and one line where ranks cannot meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import torchrun

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ({0: 1, 1: 2}, 2),  # its peer only saw it go
        ({0: 1, 1: -9}, 137),
        ({0: -15, 1: -11}, 139),  # SIGTERM is torchrun's own
        ({0: 143, 1: 143}, 143),
        ({0: 138, 1: 1}, 138),
        ({0: 1}, 1),
        ({0: -15}, 143),
    ],
)
def test_the_status_says_why(statuses: dict[int, int], status: int) -> None:
    assert torchrun.status_of(statuses) == status


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        where = ["--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={port}"]
        assert torchrun.main([*where, "--rdzv-backend=static", "x.py"]) == 2
        c10d = [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=is_host=1", "--rdzv-backend=c10d"]
        assert torchrun.main(["--nnodes=2", *c10d, "x.py"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("error (") and f"--port: {port} on 127.0.0.1" in line for line in said)


def test_fewer_gpus_than_asked_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert torchrun.main(["--standalone", "--nproc-per-node=8", "x.py"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--gpus-per-node 8: PyTorch finds 3 on this node" in said


def run_torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    # The trainer, in other tests of this process, asks torch's C++ for errors only: a user's wish that is respected.
    inherited = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, "-m", "jobs.torchrun", *words],
        cwd=REPOSITORY,
        env=inherited | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "where",
    [
        ["--rdzv-backend=c10d", "--rdzv-endpoint=no-such-host.invalid:29511", "--rdzv-conf=is_host=0,read_timeout=2"],
        [
            "--rdzv-backend=static",
            "--master-addr=127.0.0.1",
            "--master-port=9",
            "--node-rank=1",
            "--rdzv-conf=timeout=2",
        ],
    ],
    ids=["no such host", "nobody listens"],
)
def test_an_unreachable_host_is_one_line_within_the_time_out(where: list[str]) -> None:
    start = time.monotonic()
    done = run_torchrun("--nnodes=2", *where, "x.py")
    assert time.monotonic() - start < 60
    assert done.returncode == os.EX_UNAVAILABLE, done.stderr
    assert done.stderr.count("\n") == 1 and "did not meet" in done.stderr, done.stderr


def test_a_ranks_own_status_comes_through_without_a_traceback() -> None:
    done = run_torchrun("--standalone", "--nproc-per-node=2", "--no-python", "bash", "-c", "echo why >&2; exit 138")
    assert done.returncode == 138
    assert "Traceback" not in done.stderr and "why" in done.stderr
