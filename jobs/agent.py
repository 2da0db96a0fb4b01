"""A node's outer watchdog: ``python -m jobs.agent --shutdown-seconds N -- python -m jobs.torchrun ...``.

torchrun's agent can hang where a network is cut, ignoring SIGTERM (seen: 13 minutes), while its ranks are long gone or
hang too. This process starts it, hands signals on, and ends whatever it started: nothing of that outlives it, not even
where it is itself killed. Standard library only, so that it runs before anything slow is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

STRAGGLER_SECONDS = 6.0  # that others live on after one of the node's ranks has ended: ranks end together
POLL_SECONDS = 0.2
MARK = "NOISYNN_AGENT"  # in the environment of all that is started here; sessions and parents change, this does not
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


class Agent:
    """One command and all that it starts.

    shutdown_seconds: that it has to save and end after a signal.
    """

    def __init__(self, command: list[str], shutdown_seconds: float) -> None:
        self._command = command
        self._shutdown_seconds = shutdown_seconds
        self._mark = uuid.uuid4().hex
        self._asked: list[tuple[int, float]] = []  # (signal, when)
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Returns the command's exit status, or 128 + the first signal that was handed on."""
        for number in FORWARDED:
            signal.signal(number, self._note)
        follow_parent()
        pipe = start_guardian(self._mark)
        try:
            self._child = subprocess.Popen(
                self._command, env=os.environ | {MARK: self._mark}, start_new_session=True, close_fds=True
            )
            if self._asked:  # between the handlers and the child
                self._child.send_signal(self._asked[0][0])
            ended = self._watch(self._child)
        finally:
            pipe.end()  # kills what is left, and waits for that
        if self._asked:
            return 128 + self._asked[0][0]
        return 1 if ended is None else ended if ended >= 0 else 128 - ended

    def _note(self, number: int, frame: object) -> None:
        """Hands the first signal on. A scheduler sends its own to every process and twice, a person Ctrl-C once more.

        So more of them change nothing, but a second Ctrl-C: that ends all at once.
        """
        self._asked.append((number, time.monotonic()))
        if len(self._asked) == 1 and self._child is not None:
            self._child.send_signal(number)

    def _watch(self, child: subprocess.Popen[bytes]) -> int | None:
        """The child's status; None where it had to be given up."""
        seen: set[int] = set()
        ended_at: float | None = None
        while (status := child.poll()) is None:
            time.sleep(POLL_SECONDS)
            ranks = ranks_of(child.pid)
            seen |= ranks
            ended_at = (ended_at or time.monotonic()) if seen - ranks else None
            if reason := self._reason_to_end(ended_at):
                say(f"{reason}: all that it started on this node is killed")
                return None
        return status

    def _reason_to_end(self, ended_at: float | None) -> str | None:
        now = time.monotonic()
        if [number for number, _ in self._asked].count(signal.SIGINT) > 1:
            return "interrupted twice"
        if self._asked and now - self._asked[0][1] > self._shutdown_seconds:
            return f"not ended {self._shutdown_seconds:g} s after {signal.Signals(self._asked[0][0]).name}"
        if ended_at is not None and now - ended_at > STRAGGLER_SECONDS:
            return f"a rank has ended, and torchrun or another rank has not within {STRAGGLER_SECONDS:g} s"
        return None


class Guardian:
    """The other end of a pipe is held by a process that kills all that is marked, once this end is closed or gone."""

    def __init__(self, pid: int, write_end: int) -> None:
        self._pid, self._write_end = pid, write_end

    def end(self) -> None:
        os.close(self._write_end)
        os.waitpid(self._pid, 0)


def start_guardian(mark: str) -> Guardian:
    read_end, write_end = os.pipe()
    if pid := os.fork():
        os.close(read_end)
        return Guardian(pid, write_end)
    try:
        os.setsid()
        for number in (*FORWARDED, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        os.close(write_end)
        os.read(read_end, 1)
        kill_marked(mark)
    finally:
        os._exit(0)


def kill_marked(mark: str) -> None:
    """Until none is left: one that is just being started is found in the next round."""
    while found := marked(mark):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """The living processes that carry this mark; a zombie's environment is empty."""
    wanted = f"{MARK}={mark}".encode()
    return [pid for pid in processes() if wanted in environment_of(pid)]


def ranks_of(torchrun: int) -> set[int]:
    """torchrun's children that are ranks, by the variable that it gives them."""
    children = (pid for pid in processes() if parent_of(pid) == torchrun)
    return {pid for pid in children if any(item.startswith(b"LOCAL_RANK=") for item in environment_of(pid))}


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def environment_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # ended since, or another user's
        return []


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def follow_parent() -> None:
    """Asked to end, as by SIGTERM, when the process that started this one ends. A container's first has none."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def say(text: str) -> None:
    print(f"jobs.agent: {text}", file=sys.stderr, flush=True)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.agent", description=__doc__)
    parser.add_argument("--shutdown-seconds", type=float, required=True, help="to save and end after a signal")
    parser.add_argument("command", nargs="+", help="after --")
    options = parser.parse_args(words)
    try:
        return Agent(options.command, options.shutdown_seconds).run()
    except OSError as error:
        print(f"error: {options.command[0]}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
