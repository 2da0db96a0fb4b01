"""A real Slurm on this machine: one controller and two nodes, with ports, folders and a munge key of their own."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
# linear: a job has whole nodes, so two jobs never fit beside one another, and the upper partition's takes their place.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/linear
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=1 RealMemory=1000
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=90
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
"""


def tool(name: str) -> str:
    """Daemons are in folders that an ordinary user's PATH leaves out."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return shutil.which(name, path=path) or pytest.skip(f"{name} is missing: setup.sh installs slurm-wlm and munge")


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """Of the last of a job's records, where it is an array."""
        found = [word for word in self.call("scontrol", "show", "job", job).split() if word.startswith(f"{name}=")]
        return found[-1].partition("=")[2]

    def wait(self, job: str, seconds: float) -> str:
        """The state it ends in, which it must reach within that time."""
        self.until(lambda: self.field(job, "JobState") in FINAL, seconds, f"job {job} to end")
        return self.field(job, "JobState")

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds:g} s for {what}\n{self.call('squeue', '-l')}{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "".join(path.read_text()[-3000:] for path in self.folder.glob("slurm*.log"))


def free_ports() -> tuple[int, int, int]:
    """Three that nobody holds, the last two in a row: Slurm counts nodes' ports up."""
    for first in range(20000 + os.getpid() % 10000, 32000, 3):
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            try:
                for at, probe in enumerate((a, b, c)):
                    probe.bind(("127.0.0.1", first + at))
            except OSError:
                continue
            return first, first + 1, first + 2
    raise OSError("no free ports")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    daemons = {name: tool(name) for name in DAEMONS}
    folder = tmp_path_factory.mktemp("slurm")
    user = pwd.getpwuid(os.getuid()).pw_name
    (folder / "munge").mkdir(mode=0o700)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    text = CONFIGURATION.format(host=socket.gethostname(), ports=free_ports(), folder=folder, user=user)
    (folder / "slurm.conf").write_text(text)
    found = Cluster(folder)
    try:
        names = ("socket", "log-file", "pid-file", "seed-file")
        files = [f"--{name}={folder}/munge/{name.removesuffix('-file')}" for name in names]
        found.call(daemons["munged"], "--force", f"--key-file={key}", *files)
        found.call(daemons["slurmctld"])
        for node in ("n1", "n2"):
            found.call(daemons["slurmd"], "-N", node)
        found.until(lambda: found.call("sinfo", "-h", "-p", "low", "-o", "%D %T", check=False) == "2 idle", 30, "nodes")
        yield found
        found.call("scancel", "--user", user, check=False)
        found.until(lambda: not found.call("squeue", "-h", check=False), 30, "an empty queue")
    finally:
        for pid_file in (*folder.glob("slurmd-*.pid"), folder / "slurmctld.pid", folder / "munge" / "pid"):
            end_daemon(pid_file)


def end_daemon(pid_file: Path) -> None:
    if not pid_file.is_file():
        return
    pid = int(pid_file.read_text())
    os.kill(pid, 15)
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
