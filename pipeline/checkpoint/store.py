"""Generations on a store that fsspec writes to (s3://, gs://, az://, memory://, file://).

A store cannot rename a folder. Files are written under a temporary name, copied within the store, and SHA256SUMS comes
last: a generation is whole when its sums are there and right. A step that is saved a second time takes the first one's
place file by file, so that between the two only the generations before it are whole.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from data_prep.manifest import atomic_file, atomic_path
from pipeline.checkpoint.generations import (
    POINTER_NAME,
    PROGRESS_NAME,
    SUMS_NAME,
    Found,
    checkpoints_folder,
    found_of,
    generation_name,
    given_up,
    newest_name,
    next_number,
    read_sums,
    superfluous,
    temporary_name,
)
from pipeline.checkpoint.tensors import Written
from pipeline.data.remote import checked_url

_PLACE_NAME = "store"  # under RUN/checkpoints: one line, the URL


class Store:
    """The folder of a URL, and the generations in it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.fs, self.root = _file_system(self.url, os.getpid())

    def path(self, *names: str) -> str:
        return "/".join((self.root.rstrip("/"), *names))

    def names(self, *folder: str) -> list[str]:
        """What lies in a folder; nothing where there is none."""
        self.fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            return [path.rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.path(*folder), detail=False)]
        return []

    def read(self, *names: str, start: int | None = None, end: int | None = None) -> bytes:
        return self.fs.cat_file(self.path(*names), start=start, end=end)

    def write(self, body: bytes, *names: str) -> None:
        self.fs.makedirs(self.path(*names[:-1]), exist_ok=True)
        self.fs.pipe_file(self.path(*names), body)

    def remove(self, name: str) -> None:
        """A folder; its sums first, so that half of it is never taken for a generation."""
        self.fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name, SUMS_NAME))
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(name), recursive=True)

    def fetch(self, target: Path, *names: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            self.fs.get_file(self.path(*names), str(temporary))

    def generations(self) -> list[Found]:
        """The finished ones, oldest first."""
        found = []
        for name in self.names():
            if name.startswith("step-") and SUMS_NAME in (names := self.names(name)):
                sums = read_sums(self.read(name, SUMS_NAME).decode(errors="replace"))
                progress = self.read(name, PROGRESS_NAME) if PROGRESS_NAME in names else None
                found.append(found_of(name, sums, progress))
        return sorted(found)

    def latest(self) -> str:
        """What the pointer names; it may be gone."""
        with contextlib.suppress(OSError):
            return self.read(POINTER_NAME).decode(errors="replace").strip()
        return ""


class StoreDraft:
    """A generation being built on a store: LocalDraft's methods."""

    def __init__(self, url: str, step: int, attempt: int) -> None:
        self.store, self.step, self.attempt = Store(url), step, attempt
        self.name = temporary_name(step, attempt)
        self.where = self.store.url

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        path = self.store.path(self.name, name)
        self.store.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        with self.store.fs.open(path, "wb") as file:
            yield file

    def check(self, name: str, written: Written, go_on: Callable[[], None]) -> None:
        """By size alone: to read it back would cost as much again, and stores keep sums of their own."""
        go_on()
        self.store.fs.invalidate_cache()
        if self.store.fs.info(self.store.path(self.name, name))["size"] != written.bytes:
            raise OSError(f"{name} has another size in the store than was written")

    def read(self, name: str, start: int, end: int) -> bytes:
        return self.store.read(self.name, name, start=start, end=end)

    def mark(self, name: str, body: bytes = b"") -> None:
        self.store.write(body, self.name, "marks", name)

    def marks(self) -> set[str]:
        return set(self.store.names(self.name, "marks"))

    def read_mark(self, name: str) -> bytes:
        return self.store.read(self.name, "marks", name)

    def next_number(self) -> int:
        return next_number(self.store.generations())

    def publish(self, sums: Mapping[str, str], keep: int, keep_best: int) -> str:
        store, final = self.store, generation_name(self.step)
        store.remove(final)
        for name in sums:
            target = store.path(final, name)
            store.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            store.fs.cp_file(store.path(self.name, name), target)
        store.write("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode(), final, SUMS_NAME)
        store.write(f"{final}\n".encode(), POINTER_NAME)
        done = superfluous(store.generations(), final, keep, keep_best)
        for name in (self.name, *done, *given_up(store.names(), self.attempt)):
            store.remove(name)
        return final

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self.store.remove(self.name)

    def free_bytes(self) -> None:
        """Stores do not say."""

    def older(self) -> str | None:
        return newest_name(self.store.generations())


@functools.lru_cache(maxsize=4)
def _file_system(url: str, process: int) -> tuple[Any, str]:
    """One for all threads of a process: a fork needs its own connections."""
    import fsspec  # 0.1 s, and only stores need it

    return fsspec.core.url_to_fs(url)


def note_store(run: Path, url: str) -> None:
    """Writes into the run's folder where its checkpoints lie, so that whoever reads the run finds them.

    Errors: ValueError naming the URL and the mend, where nothing can be written there.
    """
    if checked_url(url).startswith(("http://", "https://")):
        raise ValueError(f"checkpoint.folder is {url}: web servers take no files, name a store or a folder")
    noted, local = store_of(run), checkpoints_folder(run)
    if noted not in (None, url) or any(local.glob("step-*")):
        raise ValueError(
            f"checkpoint.folder is {url}, but {local} has other checkpoints: move it, or name another --run"
        )
    local.mkdir(parents=True, exist_ok=True)
    with atomic_file(local / _PLACE_NAME) as file:
        file.write(f"{url}\n".encode())


def clean_store(url: str) -> None:
    """Removes what killed saves have left. By one process alone, while nobody saves."""
    store = Store(url)
    for name in store.names():
        if name.startswith(".step-") or (name.startswith("step-") and SUMS_NAME not in store.names(name)):
            store.remove(name)


def store_of(run: Path) -> str | None:
    """The URL of a run's checkpoints, or None where they lie on a disk."""
    note = checkpoints_folder(run) / _PLACE_NAME
    return note.read_text().strip() if note.is_file() else None
