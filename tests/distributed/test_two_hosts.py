"""Two network namespaces, joined by a veth pair, as two hosts: they train together, and their link is cut."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Digits

TIMEOUT_SECONDS = 8
ADDRESSES = ("10.217.64.1", "10.217.64.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class TwoHosts:
    def __init__(self) -> None:
        self.names = [f"noisynn-{os.getpid()}-{host}" for host in (0, 1)]
        self.link = [f"nn{os.getpid() % 10**7}{host}" for host in "ab"]

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            self.link[0],
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            self.link[1],
            "netns",
            self.names[1],
        )
        for name, link, address in zip(self.names, self.link, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            for device in (link, "lo"):
                ip("-n", name, "link", "set", device, "up")

    def remove(self) -> None:
        for name in self.names:  # the link goes with them
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def cut(self) -> None:
        """Each sends to a card that is not there, so packets are lost, and nothing says so to either side."""
        for name, link, peer in zip(self.names, self.link, reversed(ADDRESSES), strict=True):
            ip("-n", name, "neighbour", "replace", peer, "lladdr", "02:00:00:00:00:99", "dev", link, "nud", "permanent")

    def start(self, host: int, run: Path, digits: Digits, *options: str) -> subprocess.Popen[str]:
        meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29517", "--rdzv-id=two-hosts"]
        meet += [f"--rdzv-conf=is_host={1 - host},read_timeout=60"]
        torchrun = ["jobs.torchrun", "--nnodes=2", "--nproc-per-node=1", f"--local-addr={ADDRESSES[host]}", *meet]
        train = ["pipeline", "train", "demo", "--run", str(run), "--data.train", str(digits.train)]
        train += ["--data.val", str(digits.val), "--parallel.timeout-seconds", str(TIMEOUT_SECONDS), *options]
        agent = ["jobs.agent", "--shutdown-seconds", "60", "--", sys.executable, "-m", *torchrun, "-m", "--", *train]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], sys.executable, "-m", *agent],
            cwd=REPOSITORY,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": self.link[host]},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    if shutil.which("ip") is None:
        pytest.skip("ip is missing: setup.sh installs iproute2")
    found = TwoHosts()
    try:
        found.make()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no right to mount a network namespace: {error.stderr.strip()}")
    try:
        yield found
    finally:
        found.remove()


def processes_of(namespace: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace], check=True, capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_two_hosts_train_together_and_end_together_when_the_link_is_cut(
    hosts: TwoHosts, digits: Digits, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    agents = [hosts.start(host, run, digits, "--epochs", "2000", "--log-every", "1") for host in (0, 1)]
    try:
        end = time.monotonic() + 120
        while steps_done(run) < 5:
            assert time.monotonic() < end and all(agent.poll() is None for agent in agents), said(agents)
            time.sleep(0.1)
        hosts.cut()
        cut = time.monotonic()
        while any(processes_of(name) for name in hosts.names):
            assert time.monotonic() - cut < TIMEOUT_SECONDS + 10, said(agents)
            time.sleep(0.1)
    finally:
        for agent in agents:
            agent.kill()  # its guardian then ends all others
    for rank, (_, errors) in enumerate(agent.communicate(timeout=20) for agent in agents):
        assert re.search(r'File ".*/pipeline/\w+\.py", line \d+ in ', errors), f"no stacks of rank {rank}: {errors}"
    assert all(agent.returncode not in (0, -signal.SIGKILL) for agent in agents)
    assert json.loads((run / "config.json").read_text())["parallel"]["timeout_seconds"] == TIMEOUT_SECONDS


def said(agents: list[subprocess.Popen[str]]) -> str:
    for agent in agents:
        agent.kill()
    return "\n".join(text for agent in agents for text in agent.communicate(timeout=20))
