"""A node's outer watchdog: statuses and signals pass through it, and nothing that it has started outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
# As torchrun: its ranks are in sessions of their own. Writes its own process id and its ranks'.
TORCHRUN = """
import os, signal, subprocess, sys, time
ranks = [
    subprocess.Popen(["sleep", seconds], env=os.environ | {"LOCAL_RANK": "0"}, start_new_session=True)
    for seconds in sys.argv[2:]
]
if "deaf" in sys.argv[1]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
heard = []
if "counting" in sys.argv[1]:
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
print(os.getpid(), *(rank.pid for rank in ranks), flush=True)
end = time.monotonic() + 60
while time.monotonic() < end and not heard:
    time.sleep(0.05)
    [rank.poll() for rank in ranks]
time.sleep(1)
print(len(heard), flush=True)
"""


def start_agent(*command: str, shutdown_seconds: float = 60.0, straggler_seconds: float = 0.5) -> subprocess.Popen[str]:
    body = f"import sys, jobs.agent as a; a.STRAGGLER_SECONDS = {straggler_seconds}; sys.exit(a.main(sys.argv[1:]))"
    words = [sys.executable, "-c", body, "--shutdown-seconds", str(shutdown_seconds), "--", *command]
    return subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_torchrun(kind: str, *ranks: str, shutdown_seconds: float = 60.0) -> tuple[subprocess.Popen[str], list[int]]:
    agent = start_agent(sys.executable, "-c", TORCHRUN, kind, *ranks, shutdown_seconds=shutdown_seconds)
    assert agent.stdout is not None
    return agent, [int(word) for word in agent.stdout.readline().split()]


def living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def ended(pids: list[int], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while living(pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not living(pids)


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_the_commands_status_is_the_agents(command: str, status: int) -> None:
    assert start_agent("bash", "-c", command).wait(timeout=20) == status


def test_a_command_that_is_missing_is_one_line() -> None:
    agent = start_agent("no-such-command")
    said = agent.communicate(timeout=20)[1]
    assert (agent.returncode, said.count("\n")) == (2, 1) and "no-such-command" in said


def test_a_signal_that_comes_twice_is_handed_on_once() -> None:
    agent, pids = start_torchrun("counting", "60")
    for _ in range(2):
        agent.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert agent.communicate(timeout=20)[0] == "1\n"
    assert agent.returncode == 143 and not living(pids)  # the rank too, which nobody had signalled


def test_one_that_ignores_the_signal_has_its_time_and_no_more() -> None:
    agent, pids = start_torchrun("deaf", "60", "60", shutdown_seconds=1.5)
    agent.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert len(living(pids)) == 3
    said = agent.communicate(timeout=20)[1]
    assert agent.returncode == 143 and not living(pids)
    assert "not ended 1.5 s after SIGTERM" in said


def test_a_rank_that_ends_alone_ends_all() -> None:
    agent, pids = start_torchrun("deaf", "0.8", "60")
    said = agent.communicate(timeout=20)[1]
    assert agent.returncode == 1 and not living(pids)
    assert "a rank has ended" in said


def test_a_second_ctrl_c_ends_all_at_once() -> None:
    agent, pids = start_torchrun("deaf", "60")
    os.kill(pids[0], signal.SIGSTOP)  # nor can it hear the first
    for _ in range(2):
        agent.send_signal(signal.SIGINT)
        time.sleep(0.1)
    agent.communicate(timeout=20)
    assert agent.returncode == 130 and not living(pids)


def test_nothing_outlives_an_agent_that_is_killed() -> None:
    agent, pids = start_torchrun("deaf", "60", "60")
    agent.kill()
    assert ended(pids)
    agent.communicate(timeout=20)


def test_it_ends_with_its_parent() -> None:
    body = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    command = [sys.executable, "-m", "jobs.agent", "--shutdown-seconds", "1", "--"]
    parent = subprocess.Popen(
        [sys.executable, "-c", body, *command, sys.executable, "-c", TORCHRUN, "deaf", "60"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.kill()
    assert ended(pids, seconds=10)
    parent.communicate(timeout=20)
