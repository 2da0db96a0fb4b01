"""A generation being built, on a disk that all ranks share. (On a store: store.StoreDraft, with the same methods.)

Ranks speak to each other through files in it, since threads that run beside training may take part in no collective:
a part's JSON says that it is written and what it must be; an empty mark, which a full disk can still hold, that it is
not.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from data_prep.manifest import atomic_file
from pipeline.checkpoint.generations import (
    given_up,
    list_generations,
    newest_name,
    next_number,
    publish_generation,
    temporary_folder,
)
from pipeline.checkpoint.tensors import BLOCK_BYTES, Written

_MARKS = ".parts"


class LocalDraft:
    """A temporary folder under RUN/checkpoints."""

    def __init__(self, run: Path, step: int, attempt: int) -> None:
        self.run, self.step, self.attempt = run, step, attempt
        self.folder = temporary_folder(run, step, attempt)
        self.where = str(self.folder.parent)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """A new file, on the disk when the block ends; where it fails, its room is given back."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "wb", buffering=BLOCK_BYTES) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                # Leaves the page cache to the training data, and `check` reads what the disk has.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise

    def check(self, name: str, written: Written, go_on: Callable[[], None]) -> None:
        """Reads a file back: only what is whole on the disk may make older generations go. Errors: OSError."""
        path, digest, size = self.folder / name, hashlib.sha256(), 0
        with open(path, "rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                go_on()
                digest.update(block)
                size += len(block)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if Written(digest.hexdigest(), size) != written:
            raise OSError(f"{name} reads back otherwise than it was written: the disk is failing")

    def read(self, name: str, start: int, end: int) -> bytes:
        with open(self.folder / name, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), end - start, start)
        if len(data) != end - start:
            raise OSError(f"{name} is cut off")
        return data

    def mark(self, name: str, body: bytes = b"") -> None:
        path = self.folder / _MARKS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not body:
            path.touch()
            return
        with atomic_file(path) as file:
            file.write(body)

    def marks(self) -> set[str]:
        with contextlib.suppress(FileNotFoundError):
            return {name for name in os.listdir(self.folder / _MARKS) if not name.startswith(".")}
        return set()

    def read_mark(self, name: str) -> bytes:
        return (self.folder / _MARKS / name).read_bytes()

    def next_number(self) -> int:
        return next_number(list_generations(self.run))

    def publish(self, sums: Mapping[str, str], keep: int, keep_best: int) -> str:
        shutil.rmtree(self.folder / _MARKS)
        final = publish_generation(self.run, self.step, keep, keep_best, self.attempt, sums)
        for name in given_up(os.listdir(final.parent), self.attempt):
            shutil.rmtree(final.parent / name, ignore_errors=True)
        return final.name

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def free_bytes(self) -> int | None:
        with contextlib.suppress(OSError):
            return shutil.disk_usage(self.folder.parent).free
        return None

    def older(self) -> str | None:
        """The newest generation that stands, whatever becomes of this one."""
        return newest_name(list_generations(self.run))
