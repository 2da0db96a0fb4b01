"""Worker processes that read batches, each at the end of a pipe of its own.

torch's DataLoader has one queue for the results of all workers: one that is killed while it writes, or holds the
queue's lock, leaves the others and the trainer waiting. Here a death is seen at once, with what the dead one had.
"""

from __future__ import annotations

import collections
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as mp

from pipeline.data.batch import Batch
from pipeline.interrupt import ignore_stop_requests

_LAST_MOMENT_SECONDS = 2.0  # from the end of a pipe to the end of its process
_AHEAD = 2  # items that each worker has at once: one is read while the last is fetched

# Called in a worker: an item, and where to note the sample in hand, int64 (1,).
Read = Callable[[Any, np.ndarray], Batch]


class Death(NamedTuple):
    """A worker that ended on its own."""

    pid: int
    how: str
    sample_id: int | None  # that it had in hand


class WorkerDied(Exception):
    def __init__(self, death: Death) -> None:
        super().__init__(f"worker {death.pid} {death.how}")
        self.death = death


class Workers:
    """Forked at the first use, and kept until close()."""

    def __init__(self, count: int, read: Read) -> None:
        self._read = read
        # In memory that the workers share: read after a death, when nobody can be asked any more.
        self._in_hand = torch.full((count, 1), -1, dtype=torch.int64).share_memory_().numpy()
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._count = count
        self._owed: collections.deque[int] = collections.deque()  # workers whose results are awaited, in order

    def batches(self, items: Iterator[Any]) -> Iterator[Batch]:
        """The batches of `items` in their order. Errors: whatever reading raised; WorkerDied."""
        try:
            self._start()
            while self._owed:  # of an iteration that was given up
                self._receive()
            for number, item in enumerate(items):
                if len(self._owed) == _AHEAD * self._count:
                    yield self._result()
                self._send(number % self._count, item)
            while self._owed:
                yield self._result()
        except (KeyboardInterrupt, SystemExit):
            self.close()  # what a pipe holds then is not known
            raise

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # the end of its input ends a worker
        for process in self._processes:
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        self._owed.clear()

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        if self._processes:
            return
        context = mp.get_context("fork")
        for number in range(self._count):
            mine, theirs = context.Pipe()
            others = [*self._pipes, mine]
            process = context.Process(
                target=_work, args=(theirs, others, self._read, self._in_hand[number]), daemon=True
            )
            process.start()
            theirs.close()  # else the end of a worker would not be the end of its pipe
            self._processes.append(process)
            self._pipes.append(mine)

    def _send(self, number: int, item: Any) -> None:
        try:
            self._pipes[number].send(item)
        except OSError:  # its other end is closed
            self._raise_death()
            raise
        self._owed.append(number)

    def _result(self) -> Batch:
        batch = self._receive()
        if isinstance(batch, Exception):
            raise batch
        if torch.cuda.is_available():
            batch = batch._replace(images=batch.images.pin_memory())
        return batch

    def _receive(self) -> Batch | Exception:
        """The next that is owed; a death of any worker is met first."""
        pipe = self._pipes[self._owed[0]]
        ready = connection.wait([pipe, *(process.sentinel for process in self._processes)])
        if ready != [pipe]:
            self._raise_death()
        try:
            batch = pipe.recv()
        except (
            OSError,
            EOFError,
            RuntimeError,
        ):  # it died while it was sending, or this process has no descriptor left
            self._raise_death()
            self.close()
            raise
        self._owed.popleft()
        return batch

    def _raise_death(self) -> None:
        """Errors: WorkerDied where one has died; else nothing happens."""
        sentinels = {process.sentinel: i for i, process in enumerate(self._processes)}
        dead = connection.wait(list(sentinels), timeout=_LAST_MOMENT_SECONDS)
        if not dead:
            return
        number = sentinels[dead[0]]
        process = self._processes[number]
        process.join()
        code = process.exitcode
        how = f"ended with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        sample_id = int(self._in_hand[number, 0])
        death = Death(process.pid, how, sample_id if sample_id >= 0 else None)
        self.close()
        raise WorkerDied(death)


def _work(pipe: connection.Connection, others: list[connection.Connection], read: Read, in_hand: np.ndarray) -> None:
    """A worker's life. It ends with its input, so with the process that it works for, however that ends."""
    for other in others:
        other.close()  # the trainer's ends of all pipes, which the fork has copied
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the trainer decides
    ignore_stop_requests()
    torch.set_num_threads(1)
    try:
        while True:
            pipe.send(_answer(read, pipe.recv(), in_hand))
    except (EOFError, OSError):
        os._exit(0)  # nothing of the trainer's, copied by the fork, is to be ended here


def _answer(read: Read, item: Any, in_hand: np.ndarray) -> Batch | Exception:
    try:
        return read(item, in_hand)
    except (ValueError, OSError) as error:
        return error
    except Exception as error:
        return RuntimeError(f"a loader process met an error of the program:\n{traceback.format_exc()}{error}")
