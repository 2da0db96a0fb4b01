"""A folder of fetched files with a limit to its bytes, shared by all processes of a machine.

A file's name is the sha256 of its bytes, so data sets do not mix and a file that changed in the store is another file.
Its temporary (`.<name>.part`) has the full size from the start, so that it counts. All locks are flock's, which the
kernel drops when a process dies, however it dies:

- The folder: exclusive, for moments, around every change of names: making room, beginning a file, publishing it.
- A temporary: exclusive, by who fetches it. One without a lock is a dead process's, and goes.
- A file: shared, by who reads it. What is locked is not evicted.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.manifest import publish

_OURS = re.compile(r"(unhashed-)?[0-9a-f]{64}\.(?P<kind>tar|idx)|\.(unhashed-)?[0-9a-f]{64}\.(tar|idx)\.(?P<part>part)")

_TOTAL = ".total"  # the file with the sum of all sizes

# Of a file's name and the time of its last use, what it is worth: the least is evicted first, None never.
Worth = Callable[[str, int], tuple[int, int] | None]


class Turn(enum.Enum):
    """Why a file cannot be fetched now."""

    WHOLE = enum.auto()  # it is there
    BUSY = enum.auto()  # another fetches it
    FULL = enum.auto()  # all that could go is in use


class _Entry(NamedTuple):
    name: str
    kind: str  # "tar", "idx" or "part"
    bytes: int
    used: int  # when it was opened last, ns since the epoch


class CacheFolder:
    def __init__(self, path: Path, limit_bytes: int) -> None:
        """Makes the folder, and brings it below the limit, which may have been higher before.

        Errors: OSError where the folder cannot be made, written or locked.
        """
        self.path = path
        self.limit_bytes = limit_bytes
        self.evicted = 0  # by this process
        with self.named_errors():
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path), self._locked():
                self._reserve(0, lambda name, used: (0, used), count=True)

    def used_and_free(self) -> tuple[int, int]:
        """(bytes of the cache's files, bytes free on its disk)."""
        with self._locked():
            return sum(entry.bytes for entry in self._entries()), shutil.disk_usage(self.path).free

    def take(self, name: str, size: int) -> int | None:
        """A descriptor of a whole file, which is not evicted while it is open; None where it is not here.

        Only the size is compared: a name was given after the bytes were checked and fsynced, so it means whole bytes
        after kill -9 and power cuts too, and each picture's CRC is checked when it is read.
        """
        path = self.path / name
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                stands, whole = _stands_at(descriptor, path), os.fstat(descriptor).st_size == size
                if stands and whole:
                    _mark_used(descriptor)
                    return descriptor
                if stands:  # someone has changed it
                    with self._locked():
                        path.unlink(missing_ok=True)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def begin(self, name: str, size: int, worth: Worth) -> int | Turn:
        """A descriptor of a new temporary, locked and of full size, to be filled, and ended by finish or drop."""
        part = self._part(name)
        with self._locked():
            if (self.path / name).exists():
                return Turn.WHOLE
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return Turn.BUSY
            try:
                os.ftruncate(descriptor, 0)  # a dead process's
                if self._reserve(size, worth):
                    os.ftruncate(descriptor, size)
                    return descriptor
                self._forget(part, descriptor)
                return Turn.FULL
            except BaseException:
                self._forget(part, descriptor)
                raise

    def wait(self, name: str) -> None:
        """Until nobody fetches the file any more."""
        with contextlib.suppress(FileNotFoundError), open(self._part(name), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked meanwhile has a copy

    def finish(self, name: str, descriptor: int) -> int:
        """Gives a filled and fsynced temporary its name; returns a descriptor for reading, as `take` does."""
        with self._locked():
            publish(self._part(name), self.path / name)
            whole = os.open(self.path / name, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
            fcntl.flock(whole, fcntl.LOCK_SH)
            _mark_used(whole)
            return whole

    def drop(self, name: str, descriptor: int) -> None:
        """Gives a temporary up."""
        with self._locked():
            self._forget(self._part(name), descriptor)

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """What this machine's disk refuses becomes one message."""
        try:
            yield
        except OSError as error:
            path = self.path.absolute()
            free = shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
            message = (
                f"data.cache.folder {self.path}: {error.strerror} ({free:,} bytes are free there): name a folder on a "
                "disk of this machine that can be written, or make room, or lower data.cache.gigabytes"
            )
            raise OSError(error.errno, message) from error

    def _part(self, name: str) -> Path:
        return self.path / f".{name}.part"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # Opened anew each time, so that the threads of a process keep one another out too.
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _forget(self, part: Path, descriptor: int) -> None:
        try:
            part.unlink(missing_ok=True)
            if (total := self._total()) is not None:
                self._set_total(total - os.fstat(descriptor).st_size)
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has a copy
            os.close(descriptor)

    def _entries(self) -> Iterator[_Entry]:
        for file in os.scandir(self.path):
            if match := _OURS.fullmatch(file.name):
                with contextlib.suppress(FileNotFoundError):  # a user may delete files
                    stat = file.stat()
                    yield _Entry(file.name, match["kind"] or match["part"], stat.st_size, stat.st_mtime_ns)

    def _total(self) -> int | None:
        """The bytes of all files, or more where a process died or a user deleted some; None: not known."""
        try:
            return int((self.path / _TOTAL).read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _set_total(self, total: int) -> None:
        descriptor = os.open(self.path / _TOTAL, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, b"%020d" % total, 0)  # in place, which works on a full disk too
        finally:
            os.close(descriptor)

    def _reserve(self, size: int, worth: Worth, count: bool = False) -> bool:
        """Adds `size` bytes to the total, and evicts what that takes; tells whether they fit below the limit.

        The files are counted (7 us each) only where the total, which may be too high, leaves no room for more.
        """
        total = self._total()
        if count or total is None or total + size > self.limit_bytes:
            total = self._evict_for(size, worth)
        fits = total + size <= self.limit_bytes
        self._set_total(total + size if fits else total)
        return fits

    def _evict_for(self, size: int, worth: Worth) -> int:
        """Evicts until `size` bytes fit below the limit, if they can; returns the total of what stays."""
        entries = list(self._entries())
        total = sum(entry.bytes for entry in entries)
        dead = [entry for entry in entries if entry.kind == "part"]
        worths = {entry: worth(entry.name, entry.used) for entry in entries if entry.kind == "tar"}
        ordered = sorted((value, entry) for entry, value in worths.items() if value is not None)
        for entry in (*dead, *(entry for _, entry in ordered)):
            if total + size <= self.limit_bytes:
                break
            if self._evict(self.path / entry.name):
                total -= entry.bytes
                self.evicted += entry.kind == "tar"
        return total

    def _evict(self, path: Path) -> bool:
        """Removes a file that nobody has open; tells whether it did."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)


def _mark_used(descriptor: int) -> None:
    """Sets the time of change; file systems keep that of access coarsely or not at all."""
    now = time.time_ns()
    with contextlib.suppress(PermissionError):  # another user's file
        os.utime(descriptor, ns=(now, now))


def _stands_at(descriptor: int, path: Path) -> bool:
    """Whether a path still names the opened file, which may have been evicted before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
