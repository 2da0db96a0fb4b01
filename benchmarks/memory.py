"""Peak memory of a piece of work and of all the processes that it starts."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import print_table

_PERIOD_SECONDS = 0.02
_KCMP = {"x86_64": 312, "aarch64": 272}  # the number of the system call, which libc has no function for
_KCMP_VM = 1  # of linux/kcmp.h: do the two share their address space?


class Memory(NamedTuple):
    """Shares of memory (PSS: a page that n processes hold counts 1/n in each), summed over processes."""

    own_bytes: int  # anonymous, and shared between processes
    file_bytes: int  # mapped files: page cache, which the kernel takes back where it is needed
    processes: int


@dataclass(frozen=True)
class MemoryRow:
    """One contestant's result. The name of each field is one of the result's."""

    question: str
    part: str
    contestant: str
    settings: str
    own_bytes: int
    file_bytes: int
    processes: int

    def to_json(self, circumstances: dict[str, Any]) -> str:
        """One line. `circumstances`: what the row depends on, of `harness.circumstances_of`."""
        return json.dumps(asdict(self) | circumstances, ensure_ascii=False)


def print_memory(rows: Sequence[MemoryRow]) -> None:
    """A table for each part of the question."""
    for part in dict.fromkeys(row.part for row in rows):
        cells = [
            [row.contestant, f"{row.own_bytes / 1e6:,.1f}", f"{row.file_bytes / 1e6:,.1f}", str(row.processes)]
            for row in rows
            if row.part == part
        ]
        header = ("contestant", "MB of its own", "MB of mapped files", "processes")
        print_table(f"{rows[0].question}: {part}", header, cells)


def peak_in_new_process(prepare: Callable[[], Callable[[], object]]) -> Memory:
    """By how much memory grew while the function that `prepare` gives ran: in a new process, with all that it starts.

    A process's heap keeps what earlier work has freed, so one that has done nothing yet tells the truth. `prepare`
    can be pickled, and imports what the work needs. Errors: those of the work; ValueError where the kernel does not
    tell (/proc/PID/smaps_rollup); ChildProcessError where the process dies.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        if not _share_memory(os.getpid(), os.getpid()):
            print("note: kcmp is refused here, so a process may count twice while it is started", file=sys.stderr)
        try:
            return executor.submit(_grown, prepare, multiprocessing.get_start_method()).result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "the process whose memory was watched died: where memory ran out, take fewer --images"
            ) from error


def _grown(prepare: Callable[[], Callable[[], object]], start_method: str) -> Memory:
    multiprocessing.set_start_method(start_method, force=True)  # it was itself spawned, and would spawn others
    work = prepare()
    before = _memory_of_tree()
    with _Watch() as watch:
        work()
    return Memory(
        max(m.own_bytes for m in watch.seen) - before.own_bytes,
        max(m.file_bytes for m in watch.seen) - before.file_bytes,
        max(m.processes for m in watch.seen),
    )


class _Watch:
    """A thread that looks again and again, and once at the end."""

    def __init__(self) -> None:
        self.seen: list[Memory] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self.seen.append(_memory_of_tree())

    def _look(self) -> None:
        while not self._end.wait(_PERIOD_SECONDS):
            self.seen.append(_memory_of_tree())


def _memory_of_tree() -> Memory:
    import psutil  # only this question needs it

    me = os.getpid()
    found = [_memory_of(me)]
    for process in psutil.Process(me).children(recursive=True):
        with contextlib.suppress(OSError, psutil.NoSuchProcess):  # one that ended in between
            if not _share_memory(process.pid, process.ppid()):
                found.append(_memory_of(process.pid))
    return Memory(sum(m.own_bytes for m in found), sum(m.file_bytes for m in found), len(found))


def _share_memory(process: int, parent: int) -> bool:
    """Whether both run in one address space, as they do from vfork to exec.

    `subprocess` starts everything so. PSS counts by page tables, and there is one, so it shows all the parent's memory
    for each of the two.
    """
    number = _KCMP.get(platform.machine())
    return number is not None and ctypes.CDLL(None).syscall(number, process, parent, _KCMP_VM, 0, 0) == 0


def _memory_of(process: int) -> Memory:
    path = Path(f"/proc/{process}/smaps_rollup")
    lines = path.read_text().splitlines()[1:]  # the first is an address
    if not lines:
        raise ProcessLookupError(f"{path} is empty: the process ends")
    kilobytes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    if "Pss_Anon" not in kilobytes:
        raise ValueError(f"{path} has no Pss_Anon: memory is measured with Linux 5.4 or later; leave it out of --parts")
    own, files = kilobytes["Pss_Anon"] + kilobytes["Pss_Shmem"], kilobytes["Pss_File"]
    return Memory(own * 1024, files * 1024, 1)
