"""Large sequential writes: past the page cache where the file system lets them, and beside the work of the caller."""

from __future__ import annotations

import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, Self

WRITE_BYTES = 4 << 20  # handed to the disk at once


class BackgroundWriter:
    """Appends bytes to a file. While a thread writes one buffer, the caller fills the other.

    All is in the file after `finish()`; making it lasting (fsync) is left to the caller. A failed write's OSError is
    raised by the next `append` or by `finish`. Leaving the `with` block waits for a write under way, so that the file
    may be closed then.
    """

    def __init__(self, file: IO[bytes], direct: bool) -> None:
        """`direct`: without the page cache, where that can be done."""
        # A descriptor of its own: even where waiting is broken off, none but this file is ever written to.
        self._descriptor = os.dup(file.fileno())
        # Their addresses are multiples of a page's size, as direct writes need.
        self._buffer, self._other = (memoryview(mmap.mmap(-1, WRITE_BYTES)) for _ in range(2))
        self._filled = 0
        # Past the page cache: filling that with 100 GB that nobody reads soon took half of all the processor time (200
        # of 350 us a picture), and threw out the sources' pages.
        self._direct = direct and _set_direct(self._descriptor, True)
        self._thread = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None

    def append(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            part = rest[: WRITE_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == WRITE_BYTES:
                self._hand_over()

    def finish(self) -> None:
        self._wait()
        self._end_direct()  # the rest is no whole number of the disk's blocks
        self._write(self._buffer[: self._filled])
        self._filled = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        os.close(self._descriptor)

    def _hand_over(self) -> None:
        self._wait()
        self._under_way = self._thread.submit(self._write, self._buffer)
        self._buffer, self._other = self._other, self._buffer
        self._filled = 0

    def _wait(self) -> None:
        """Until the write under way has ended. Errors: its own."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

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
