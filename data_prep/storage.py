"""Where files lie: a folder of this machine, or one of an object store that fsspec reads (s3://, gs://, memory://).

A file appears under its name whole or not at all: here by a rename, there because a store shows an object only when its
upload has ended. A shard is built on the local disk first ($TMPDIR) and is then sent.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, Protocol

from data_prep.manifest import atomic_file, remove_orphans

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")


class Folder(Protocol):
    """A flat folder; a name may hold one level of subfolder (`.train.parts/x.json`). Errors: OSError with the place."""

    def where(self, name: str = "") -> str:
        """What messages call the folder, or a file in it."""

    def file(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Opens a file to write, which gets its name at the end, if no error was raised."""

    def local(self, name: str) -> AbstractContextManager[Path]:
        """The file on a local path, to read; a store's file is fetched, and removed at the end."""

    def read(self, name: str) -> bytes: ...

    def size(self, name: str) -> int | None:
        """Bytes; None where there is no such file."""

    def names(self, pattern: str) -> list[str]:
        """Files whose names match the shell pattern, sorted."""

    def remove(self, name: str) -> None:
        """Removes a file, where it is there."""

    def remove_orphans(self, pattern: str) -> None:
        """Removes what killed jobs left behind under temporary names, of files whose names match the shell pattern."""

    def locked(self) -> AbstractContextManager[None]:
        """Keeps other jobs from changing one file at once, where the file system has locks."""


def open_folder(url: str | Path) -> Folder:
    """The folder that a path or URL names; whether it is there is seen when it is used."""
    url = str(url)
    path = local_path(url)
    return RemoteFolder(url.rstrip("/")) if path is None else LocalFolder(path)


def open_file(url: str | Path) -> tuple[Folder, str]:
    """The folder of a file, and its name in it."""
    head, slash, name = str(url).rpartition("/")
    return open_folder(head or slash or "."), name


def local_path(url: str) -> Path | None:
    """The path of something on this machine's file systems; None for a store's URL."""
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    return None if _URL.match(url) else Path(url)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Errors: ValueError with the mend."""
    import fsspec  # 0.1 s, and only stores need it

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{url} cannot be opened ({error}): name a folder, or a URL that fsspec knows") from error


@contextlib.contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Stores' libraries raise errors of their own kinds: each becomes an OSError that names the place."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where} is missing") from error
    except (OSError, ValueError, MemoryError, AssertionError):
        raise
    except Exception as error:
        raise OSError(f"{where}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class LocalFolder:
    path: Path

    def where(self, name: str = "") -> str:
        return str(self.path / name)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[IO[bytes]]:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            yield file

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        yield self.path / name

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def size(self, name: str) -> int | None:
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def names(self, pattern: str) -> list[str]:
        head, _, pattern = pattern.rpartition("/")
        folder = self.path / head
        if not folder.is_dir():
            return []
        found = [entry.name for entry in os.scandir(folder) if fnmatchcase(entry.name, pattern)]
        return sorted(f"{head}/{name}" if head else name for name in found)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def remove_orphans(self, pattern: str) -> None:
        head, _, pattern = pattern.rpartition("/")
        remove_orphans(self.path / head, pattern)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


@dataclass(frozen=True)
class RemoteFolder:
    url: str

    def where(self, name: str = "") -> str:
        return f"{self.url}/{name}" if name else self.url

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[IO[bytes]]:
        with tempfile.NamedTemporaryFile(prefix="noisynn-", suffix=f"-{Path(name).name}") as file:
            yield file
            file.flush()
            size = os.fstat(file.fileno()).st_size
            with named_errors(self.where(name)):
                fs, path = file_system(self.where(name))
                # Stores have no folders and take this for done; file systems behind fsspec need it.
                fs.makedirs(fs._parent(path), exist_ok=True)
                fs.put_file(file.name, path)
                fs.invalidate_cache()
                if (sent := fs.info(path)["size"]) != size:
                    raise OSError(f"{self.where(name)} has {sent} bytes of {size} after it was sent: run it again")

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="noisynn-") as folder:
            path = Path(folder) / Path(name).name
            with named_errors(self.where(name)):
                fs, remote = file_system(self.where(name))
                fs.get_file(remote, str(path))
            yield path

    def read(self, name: str) -> bytes:
        with named_errors(self.where(name)):
            fs, path = file_system(self.where(name))
            return fs.cat_file(path)

    def size(self, name: str) -> int | None:
        with named_errors(self.where(name)):
            fs, path = file_system(self.where(name))
            try:
                return fs.info(path)["size"]
            except FileNotFoundError:
                return None

    def names(self, pattern: str) -> list[str]:
        head, _, pattern = pattern.rpartition("/")
        with named_errors(self.where(head)):
            fs, path = file_system(self.where(head))
            fs.invalidate_cache()
            try:
                found = [entry.rpartition("/")[2] for entry in fs.ls(path, detail=False)]
            except FileNotFoundError:
                return []
        return sorted(f"{head}/{name}" if head else name for name in found if fnmatchcase(name, pattern))

    def remove(self, name: str) -> None:
        with named_errors(self.where(name)):
            fs, path = file_system(self.where(name))
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(path)

    def remove_orphans(self, pattern: str) -> None:
        """A store has no temporary names; scratch files of a killed process lie in $TMPDIR, as any program's do."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        yield
