"""Large sequential writes, hashed: past the page cache where the file system lets them, beside the caller's work."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, NamedTuple, Self

WRITE_BYTES = 4 << 20  # handed to the disk at once
BUFFERS = 4  # One is filled, one written; the others even out a disk that takes some writes sooner than others.


class _UnderWay(NamedTuple):
    buffer: memoryview
    hashed: Future[None]
    written: Future[None]


class BackgroundWriter:
    """Appends bytes to a file. While one thread hashes full buffers and another writes them, the caller fills the next.

    All is in the file and in `sha256` after `finish()`; making it lasting (fsync) is left to the caller. A failed
    write's OSError is raised by a later `append` or by `finish`. Leaving the `with` block waits for a write under way,
    so that the file may be closed then.
    """

    def __init__(self, file: IO[bytes], direct: bool) -> None:
        """`direct`: without the page cache, where that can be done."""
        # A descriptor of its own: even where waiting is broken off, none but this file is ever written to.
        self._descriptor = os.dup(file.fileno())
        # Their addresses are multiples of a page's size, as direct writes need.
        self._free = [memoryview(mmap.mmap(-1, WRITE_BYTES)) for _ in range(BUFFERS)]
        self._buffer = self._free.pop()
        self._filled = 0
        self.sha256 = hashlib.sha256()
        # Past the page cache: filling that with 100 GB that nobody reads soon took half of all the processor time (200
        # of 350 us a picture), and threw out the sources' pages.
        self._direct = direct and _set_direct(self._descriptor, True)
        self._hashing, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._under_way: deque[_UnderWay] = deque()

    def append(self, data: bytes) -> None:
        end = self._filled + len(data)
        if end < WRITE_BYTES:  # as nearly always
            self._buffer[self._filled : end] = data
            self._filled = end
            return
        rest = memoryview(data)
        while rest:
            part = rest[: WRITE_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == WRITE_BYTES:
                self._hand_over()

    def finish(self) -> None:
        while self._under_way:
            self._wait()
        self._end_direct()  # the rest is no whole number of the disk's blocks
        rest = self._buffer[: self._filled]
        self.sha256.update(rest)
        self._write(rest)
        self._filled = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for threads in (self._hashing, self._writing):
            threads.shutdown(wait=True, cancel_futures=True)
        os.close(self._descriptor)

    def _hand_over(self) -> None:
        full = self._buffer
        hashed = self._hashing.submit(self.sha256.update, full)
        self._under_way.append(_UnderWay(full, hashed, self._writing.submit(self._write, full)))
        if not self._free:
            self._wait()
        self._buffer = self._free.pop()
        self._filled = 0

    def _wait(self) -> None:
        """Until the oldest buffer under way is hashed and written. Errors: the write's own."""
        oldest = self._under_way.popleft()
        oldest.hashed.result()
        oldest.written.result()
        self._free.append(oldest.buffer)

    def _write(self, rest: memoryview) -> None:
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
            if rest:  # a disk about to be full takes a part, after which nothing is aligned
                self._end_direct()

    def _end_direct(self) -> None:
        if self._direct:
            _set_direct(self._descriptor, False)
            self._direct = False


def _set_direct(descriptor: int, on: bool) -> bool:
    """Whether it could be done: not every file system takes direct writes."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return True
