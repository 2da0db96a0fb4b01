"""Batches ahead of their use: a plan of sample ids, read by native threads or by worker processes.

Native threads need no process boundary: what they read is the batch. Where Python itself does the work (RandAugment, or
Pillow where the native library was not built) threads would wait for one another, so processes do it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from pipeline.data.batch import Batch, Reader
from pipeline.data.processes import Death, WorkerDied, Workers

IN_FLIGHT = 3  # batches on the threads: one ends while the next is under way, and one waits


class Item(NamedTuple):
    """What is read at once."""

    sample_ids: np.ndarray  # int64 (B,)
    epoch: int | None
    shards: np.ndarray  # needed from here on, in that order


_NOTHING = Item(np.empty(0, np.int64), None, np.empty(0, np.int64))

Plan = Callable[[], Iterator[Item]]


class Stream:
    """Reads a plan again and again. Iterating gives its batches in its order; errors come where their batch would."""

    def __init__(self, reader: Reader, plan: Plan, processes: int, persistent: bool) -> None:
        """processes: 0 reads on threads. persistent: the processes stay for the next iteration."""
        self._reader = reader
        self._plan = plan
        self._persistent = persistent
        self._iteration = 0
        self._processes = processes
        self._workers = Workers(processes, _ReadItem(reader)) if processes else None

    def __iter__(self) -> Iterator[Batch]:
        """Errors: RuntimeError in an iteration that goes on after another has begun: they would share one plan."""
        self._iteration += 1
        mine = self._iteration
        for batch in self._batches(mine):
            yield batch
            if mine != self._iteration:
                raise RuntimeError("another iteration of this loader has begun: only the newest goes on")
        _Expected(self._reader)(_NOTHING)  # another split may need the room

    def _batches(self, mine: int) -> Iterator[Batch]:
        if self._workers is not None:
            return self._from_processes(self._workers, mine)
        if self._reader.threaded:
            return self._from_threads()
        # RandAugment draws from global generators, which a thread would seed under the caller's hands.
        return map(_ReadItem(self._reader), self._plan())

    def close(self) -> None:
        """Ends the worker processes; another iteration starts them again."""
        if self._workers is not None:
            self._workers.close()

    def _from_threads(self) -> Iterator[Batch]:
        tell = _Expected(self._reader)
        with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="loader") as pool:
            coming: collections.deque[tuple[Item, Future[Batch]]] = collections.deque()

            def oldest() -> Batch:
                # What is needed from the oldest on: none of those under way may lose a shard.
                tell(coming[0][0])
                batch = coming[0][1].result()
                coming.popleft()
                return batch

            try:
                for item in self._plan():
                    if not coming:
                        tell(item)
                    coming.append((item, pool.submit(self._reader.batch, item.sample_ids, item.epoch)))
                    if len(coming) == IN_FLIGHT:
                        yield oldest()
                while coming:
                    yield oldest()
            finally:
                for _, future in coming:
                    future.cancel()

    def _from_processes(self, workers: Workers, mine: int) -> Iterator[Batch]:
        try:
            yield from workers.batches(self._plan())
            if self._persistent:
                for _ in workers.batches(iter([_NOTHING] * self._processes)):  # each keeps what it needed last
                    pass
        except WorkerDied as error:
            raise ChildProcessError(self._last_words(error.death)) from None
        finally:
            if not self._persistent and mine == self._iteration:
                workers.close()

    def _last_words(self, death: Death) -> str:
        had = "no sample yet" if death.sample_id is None else self._reader.where(death.sample_id)
        return (
            f"a loader process (pid {death.pid}) {death.how} while it had {had}: where memory ran out, lower "
            "data.workers; else check the shard with `python -m data_prep verify`; then start the same command, "
            "which goes on"
        )


class _Expected:
    """Tells a reader of the shards it needs, where they have changed."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._told: np.ndarray | None = None

    def __call__(self, item: Item) -> None:
        if self._told is None or not np.array_equal(item.shards, self._told):
            # A cache has room for training's windows, as was checked; of what is evaluated it may be that it has not.
            self._reader.expect(item.shards, keep=item.epoch is not None)
            self._told = item.shards


class _ReadItem:
    """Reads one item after another."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._tell = _Expected(reader)

    def __call__(self, item: Item, in_hand: np.ndarray | None = None) -> Batch:
        """in_hand: where a worker process notes its sample."""
        self._tell(item)
        return self._reader.batch(item.sample_ids, item.epoch, in_hand)
