"""Work spread over local processes, in order, such that a dead process is one clear error and never a hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

Progress = Callable[[int, int, int], None]  # called with (samples just done, their bytes, samples in all; 0: unknown)


def silent(count: int, size: int, total: int) -> None:
    """The Progress that tells nobody."""


GRACE_SECONDS = 5  # for an orphan to remove its temporary file
JOBS_AHEAD = 2  # of each process: enough to keep it busy, few enough to bound the results that wait in memory


def map_ordered(function: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> Iterator[Result]:
    """Yields function(job) for each job, in the jobs' order, computed by `processes` processes (1: by this one).

    The first error of a job is raised here, after the jobs under way have ended.
    Errors: ChildProcessError where a process died.
    """
    processes = min(processes, len(jobs))
    if processes <= 1:
        yield from map(function, jobs)
        return
    # Fork would copy the locks of whatever threads run here (a progress bar's, ffcv's) and could hang for ever.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) >= processes * JOBS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process died (killed, or out of memory): run the same command again, with fewer --processes "
            "where memory is short"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches every process of a terminal; the parent alone decides, and lets open shards end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that temporary files go
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's process waits for work for ever when its parent was killed: end it instead."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os._exit(1)
