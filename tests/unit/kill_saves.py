"""Saves that are killed: a process that has imported what it needs forks one child a save, and waits to be told to go.

Run as a program it answers lines of JSON. {"run", "step", "keep", "kill_after"}: it forks, prints the child's pid, and
at the next line (empty) lets the child save, two ranks in one process. It then prints how the child ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from checkpoint_states import even, save_all, whole_state, writers_of

# All that changes a disk or makes a change last, as CPython calls it.
CALLS = ("mkdir", "openat", "write", "fsync", "ftruncate", "flock", "rename", "unlink", "unlinkat", "rmdir")


def child(body: dict, ready: int) -> None:
    os.read(ready, 1)
    pieces = even(whole_state(body["step"]), 2)
    failed = save_all(writers_of(Path(body["run"]), 2, keep=body["keep"]), body["step"], pieces)
    os._exit(3 if failed else 0)


def serve() -> None:
    for line in sys.stdin:
        body = json.loads(line)
        ready, go = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                child(body, ready)
            finally:
                os._exit(4)
        print(pid, flush=True)
        sys.stdin.readline()
        os.write(go, b"x")
        if body["kill_after"]:  # its pid is its own until it is waited for, below
            time.sleep(body["kill_after"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(ready)
        os.close(go)
        print(os.waitstatus_to_exitcode(status), flush=True)


class Server:
    """The program, and strace beside its children."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        environment = os.environ | {"PYTHONPATH": f"{here.parents[1]}:{here}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def save(self, run: Path, step: int, keep: int, strace: list[str] | None = None, kill_after: float = 0) -> int:
        """One save; the exit status, negative for a signal. `kill_after`: seconds after it was let go."""
        self._send(json.dumps({"run": str(run), "step": step, "keep": keep, "kill_after": kill_after}))
        pid = self._answer()
        tracer = None
        if strace is not None:
            command = ["strace", "-f", "-p", str(pid), *strace]
            tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            assert tracer.stderr is not None
            assert "attached" in (said := tracer.stderr.readline()), said
        self._send("")
        status = self._answer()
        if tracer is not None:
            tracer.communicate(timeout=30)
        return status

    def calls(self, run: Path, step: int, keep: int, log: Path) -> Counter[tuple[str, str]]:
        """How often each thread of a save that is let alone makes each call."""
        assert self.save(run, step, keep, ["-e", f"trace={','.join(CALLS)}", "-o", str(log)]) == 0
        counts: Counter[tuple[str, str]] = Counter()
        for line in log.read_text().splitlines():
            thread, _, rest = line.partition(" ")
            name = rest.strip().partition("(")[0]
            if name in CALLS:
                counts[thread, name] += 1
        return counts


if __name__ == "__main__":
    serve()
    os._exit(0)  # torch takes two seconds to end
