"""`python -m ...` without the seconds in which Python imports torch, timm and DeepSpeed: forked from one that has.

It has imported other people's libraries alone, so each command imports all of the project anew. Ranks are forked too,
by torch's own agent. What only a start from nothing shows is tested by other commands: the demo's, those of Slurm, two
hosts and a container, and the first of tests/distributed/test_two_ranks.py.

Run as a program with a descriptor, it is that process; WarmPython is its other end.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).parent.parent
LIBRARIES = ("torch", "timm", "numpy", "PIL.Image", "safetensors.torch", "psutil", "tyro", "yaml", "jinja2", "sklearn")
LIBRARIES += ("pyarrow.parquet", "scipy.io", "webdataset", "matplotlib.figure", "torch.utils.tensorboard")
LIBRARIES += ("torch.distributed.launcher.api", "accelerate", "transformers.integrations")
LIBRARIES += ("deepspeed.runtime.zero.utils", "deepspeed.runtime.zero.muon.original_muon")
# A GPU's driver does not outlive a fork: where there is one, nothing is imported ahead.
HAS_GPU = Path("/dev/nvidiactl").exists()
# One thread: those that a fork leaves behind are waited for in vain. The rest the trainer sets before it imports.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DEEPSPEED_LOG_LEVEL": "warning", "TORCH_CPP_LOG_LEVEL": "ERROR"}
ENVIRONMENT |= {} if HAS_GPU else {"DS_ACCELERATOR": "cpu"}
NUMBER = 20  # characters of a number that the supervisor tells


class Running:
    """A command, as `subprocess.Popen` shows it: what it says is read when it has ended."""

    def __init__(self, words: list[str], pid: int, ended: int, out: Any, err: Any) -> None:
        self.args, self.pid = words, pid
        self.returncode: int | None = None
        self._ended, self._said = ended, (out, err)

    def poll(self, timeout: float = 0) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            self.returncode = int(os.read(self._ended, NUMBER))
            os.close(self._ended)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        if self.poll(timeout) is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.args, timeout, *map(self._text, self._said))
        out, err = map(self._text, self._said)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    @staticmethod
    def _text(file: Any) -> str:
        file.seek(0)
        return file.read().decode()


class WarmPython:
    """Starts commands from the repository's root, in sessions of their own."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, __file__, str(theirs.fileno())]
        self._server = subprocess.Popen(
            words, pass_fds=[theirs.fileno()], env=os.environ | ENVIRONMENT, cwd=REPOSITORY, start_new_session=True
        )
        theirs.close()
        assert self._channel.recv(10) == b"ready"

    def start(self, *words: str, **environment: str) -> Running:
        """`python words`."""
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        ended, tell = os.pipe()
        request = {"words": words, "environment": os.environ | ENVIRONMENT | {"COLUMNS": "100"} | environment}
        socket.send_fds(self._channel, [json.dumps(request).encode()], [out.fileno(), err.fileno(), tell])
        os.close(tell)
        return Running(list(words), int(os.read(ended, NUMBER)), ended, out, err)

    def run(self, *words: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """`python -m words`, to its end."""
        running = self.start("-m", *words, **environment)
        said = running.communicate(timeout)
        return subprocess.CompletedProcess(running.args, running.returncode, *said)

    def close(self) -> None:
        self._channel.close()
        self._server.wait(30)


class Forked:
    """What torch's agent needs of a Popen, for its ranks."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], stdout: Any, stderr: Any, start_new_session: bool):
        assert args[0] == sys.executable and start_new_session
        self.args = args
        self.returncode: int | None = None
        descriptors = [1 if stdout is None else stdout.fileno(), 2 if stderr is None else stderr.fileno()]
        self.pid = fork()
        if self.pid == 0:
            become(list(args[1:]), env, *descriptors)

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self, timeout: float = 1e9) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        return self.returncode


def fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()


def become(words: list[str], environment: dict[str, str], out: int, err: int) -> NoReturn:
    """This process goes on as `python words`."""
    os.setsid()
    os.dup2(out, 1), os.dup2(err, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    status: Any = 0
    try:
        run(words[1:] if words[0] == "-u" else words)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def run(words: list[str]) -> None:
    sys.path[1:1] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def supervise(request: dict[str, Any], out: int, err: int, tell: int) -> NoReturn:
    """The command's parent: says its number, and then its status."""
    pid = fork()
    if pid == 0:
        become(request["words"], request["environment"], out, err)
    os.write(tell, str(pid).rjust(NUMBER).encode())
    os.write(tell, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).rjust(NUMBER).encode())
    os._exit(0)


def serve(channel: socket.socket) -> None:
    """Until the other end is closed."""
    channel.send(b"ready")
    while (received := socket.recv_fds(channel, 1 << 20, 3))[0]:
        data, descriptors, *_ = received
        if fork() == 0:
            supervise(json.loads(data), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):  # none is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def warm_up() -> None:
    for name in LIBRARIES:
        # As in pipeline.parallel: DeepSpeed would compile as it is imported.
        os.environ |= {"TORCHDYNAMO_DISABLE": "1"} if name.startswith("deepspeed") else {}
        with contextlib.suppress(ImportError):  # the command itself will say so
            importlib.import_module(name)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = Forked


if __name__ == "__main__":
    if not HAS_GPU:
        warm_up()
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # at once: taking all of it down would take seconds
