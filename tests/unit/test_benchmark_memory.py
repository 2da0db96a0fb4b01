"""Peak memory of a piece of work in a process of its own, and of the processes that it starts."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from benchmarks import memory
from benchmarks.memory import Memory, MemoryRow, peak_in_new_process, print_memory

MEGABYTES = 64  # that a process holds
CLONE_VM, CLONE_VFORK = 0x100, 0x4000  # of linux/sched.h


def _hold(megabytes: int, children: int) -> Callable[[], None]:
    """In a process of its own: before the work as much as in it, so that only the growth counts."""
    _hold.before = np.ones(megabytes << 20, np.uint8)  # type: ignore[attr-defined]

    def work() -> None:
        held = np.ones(megabytes << 20, np.uint8)
        code = f"import time; held = bytearray(b'x') * ({megabytes} << 20); print(flush=True); time.sleep(60)"
        started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(children)]
        for process in started:
            process.stdout.readline()
        time.sleep(0.2)
        for process in started:
            process.kill()
            process.wait()
        assert held.any()

    return work


def test_memory_is_the_growth_of_all_processes():
    peak = peak_in_new_process(partial(_hold, 64, 2))
    assert peak.processes == 3
    assert 3 * 64 << 20 <= peak.own_bytes < 3 * 64 + 100 << 20  # two more Pythons are some megabytes each
    assert 0 <= peak.file_bytes < 100 << 20


def _start_slowly() -> Callable[[], None]:
    """As vfork does: the child runs in the parent's memory, which waits for it; here it sleeps instead of exec."""
    libc = ctypes.CDLL(None)
    libc.clone.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    sleep, stack = ctypes.cast(libc.usleep, ctypes.c_void_p), ctypes.create_string_buffer(1 << 16)
    top = (ctypes.addressof(stack) + len(stack)) // 16 * 16
    _start_slowly.before = np.ones(MEGABYTES << 20, np.uint8)  # type: ignore[attr-defined]

    def work() -> None:
        child = libc.clone(sleep, top, CLONE_VM | CLONE_VFORK | signal.SIGCHLD, 300_000)
        assert os.waitpid(child, 0) == (child, 0)

    return work


def _fork() -> Callable[[], None]:
    held = np.ones(MEGABYTES << 20, np.uint8)

    def work() -> None:
        child = os.fork()
        if child == 0:
            held[:] = 2  # its own copy
            time.sleep(0.3)
            os._exit(0)
        os.waitpid(child, 0)

    return work


def test_a_process_in_its_parents_memory_is_not_counted_twice():
    started = peak_in_new_process(_start_slowly)
    assert started.processes == 1 and started.own_bytes < MEGABYTES << 19
    forked = peak_in_new_process(_fork)
    assert forked.processes == 2 and forked.own_bytes >= MEGABYTES << 20


def test_where_the_kernel_does_not_compare_a_note_says_so(monkeypatch, capsys):
    monkeypatch.setattr(memory, "_KCMP", {})
    assert peak_in_new_process(_fork).processes == 2
    assert capsys.readouterr().err.count("may count twice") == 1


def _refuse() -> Callable[[], None]:
    raise ValueError("no such file: write it again")


def test_an_error_of_the_watched_work_comes_back():
    with pytest.raises(ValueError, match="write it again"):
        peak_in_new_process(_refuse)


def _die() -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signal.SIGKILL)


def test_a_watched_process_that_dies_is_an_error():
    with pytest.raises(ChildProcessError, match="died"):
        peak_in_new_process(_die)


def test_memory_is_printed_by_part(capsys):
    row = MemoryRow("loader", "memory", "tars", "how", *Memory(12_300_000, 400_000, 3))
    print_memory([row, MemoryRow("loader", "memory of a plan", "all", "how", 5_200_000, 0, 1)])
    text = capsys.readouterr().out
    assert all(word in text for word in ("loader: memory", "12.3", "0.4", "memory of a plan", "5.2"))
    assert json.loads(row.to_json({"note": "here"})) == {
        "question": "loader",
        "part": "memory",
        "contestant": "tars",
        "settings": "how",
        "own_bytes": 12_300_000,
        "file_bytes": 400_000,
        "processes": 3,
        "note": "here",
    }
