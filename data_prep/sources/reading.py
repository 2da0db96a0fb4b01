"""What sources share: names that are pictures, reading ahead, and a file's stamp."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from data_prep.sources import PICTURE_SUFFIXES
from data_prep.storage import file_system, local_path, named_errors

# Of pictures in a store: 16 requests of 50 ms each, under way at once, give 320 pictures/s a process.
REQUESTS_AHEAD = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


def check_suffix(name: str, where: str) -> None:
    """Errors: ValueError where `name` is not a picture's."""
    if not name.lower().endswith(PICTURE_SUFFIXES):
        known = " ".join(PICTURE_SUFFIXES)
        raise ValueError(f"{where} is no picture by its name (known: {known}): remove it, or rename it")


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """read(item) for each, in order, with requests under way ahead: a store answers slowly, but many at once."""
    with ThreadPoolExecutor(REQUESTS_AHEAD) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > REQUESTS_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def file_stamp(url: str) -> str:
    """Changes when the file changes: its size in bytes, and its time or the store's tag. Errors: OSError naming it."""
    path = local_path(url)
    if path is not None:
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns}"
    with named_errors(url):
        fs, remote = file_system(url)
        info = fs.info(remote)
    tag = next((str(info[name]) for name in ("ETag", "etag", "md5Hash", "mtime", "created") if name in info), "")
    return f"{info['size']} {tag}"


@dataclass(frozen=True)
class FileStamps:
    """file_stamp of files that hold many pictures. A store is asked once for each: once a picture would take hours."""

    _known: dict[str, str] = field(default_factory=dict)

    def of(self, url: str) -> str:
        if local_path(url) is not None:
            return file_stamp(url)
        if url not in self._known:
            self._known[url] = file_stamp(url)
        return self._known[url]
