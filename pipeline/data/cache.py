"""Shards of a store on this machine's disk: fetched once for all ranks, checked, and evicted where room is needed."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_prep.manifest import INDEX_HEADER, INDEX_RECORD, INDEX_TRAILER, ShardRecord
from pipeline.data.cache_folder import CacheFolder, Turn
from pipeline.data.remote import RetryConfig, checked_url, fetch_blocks, file_size, file_url
from pipeline.data.source import NoRoom

_SMALL_REQUESTS = 16  # at once: an index is some 20 KB, so its time is the way to the store and back
_POLL_SECONDS = 0.1  # between looks for room, by who needs a shard now
_AHEAD_POLL_SECONDS = 2.0  # by who fetches ahead: a look takes 8 ms where there are a thousand files


@dataclass(frozen=True)
class CacheConfig:
    """Shards of an object store on this machine's disk. All ranks of a machine share it; local shards need none."""

    folder: Path = Path("cache/shards")
    """On a disk of the machine itself. Runs may share it."""
    gigabytes: float = 100.0
    """The most that its files have at any moment, those being fetched included; 1 GB is 10^9 bytes."""
    ahead: int = 2
    """Shards that each process which reads fetches at once, before they are needed; 0 fetches what is needed now."""
    retry: RetryConfig = field(default_factory=RetryConfig)

    def __post_init__(self) -> None:
        if not self.gigabytes > 0:
            raise ValueError(f"data.cache.gigabytes is {self.gigabytes}: give the limit of the cache, more than 0")
        if self.ahead < 0:
            raise ValueError(f"data.cache.ahead is {self.ahead}: at least 0")


@dataclass
class CacheStats:
    """What this process has met."""

    hits: int = 0  # files that were there when they were asked for
    fetched: int = 0  # files
    fetched_bytes: int = 0
    retried: int = 0  # requests
    failed_ahead: int = 0  # files that could not be fetched ahead; whoever needs them tries again
    evicted: int = 0  # shards


class _File(NamedTuple):
    """A file of the store, and what the manifest says of it."""

    name: str  # in the cache
    url: str
    bytes: int
    sha256: str | None


class _NotNeeded(Exception):
    """A new plan came while a file of the old one was being fetched ahead."""


class _Plan:
    """Files in the order in which they will be needed, and how far fetching them ahead has come."""

    def __init__(self, files: list[_File]) -> None:
        self.files = files
        self.places = {file.name: i for i, file in enumerate(files)}
        self.next = 0

    def worth(self, name: str, used: int) -> tuple[int, int]:
        """Least is what is not in the plan, by its last use; then what is needed last."""
        place = self.places.get(name)
        return (0, used) if place is None else (1, -place)


class ShardCache:
    """The files of one split. Threads may share it, and a forked process may go on with it."""

    def __init__(self, base_url: str, shards: Sequence[ShardRecord], config: CacheConfig) -> None:
        """base_url: the folder of the shards in the store.

        Errors: ValueError, OSError where the URL is not allowed, or the folder or its limit will not do.
        """
        checked_url(base_url)
        self._config = config
        self._shards = {shard.name: _shard_file(base_url, shard) for shard in shards}
        self._indexes = {shard.name: _index_file(base_url, shard) for shard in shards}
        self._folder = CacheFolder(config.folder, round(config.gigabytes * 1e9))
        self._has_indexes = False
        self._check_room()
        self._start_afresh()
        _caches.add(self)

    def open(self, name: str, wait: bool = True) -> int:
        """A descriptor of the whole shard, for the caller to close; fetches it where it is not here.

        While any process has it open the shard is not evicted. wait: for room, where all that could go is in use; who
        has shards open must not, since another may wait for those. Errors: OSError naming the URL and the mend;
        NoRoom.
        """
        file = self._shards[name]
        descriptor = self._folder.take(file.name, file.bytes)
        if descriptor is not None:
            self._count(hits=1)
            return descriptor
        try:
            return self._fetched(file, wait)
        except OSError as error:
            if earlier := self._failures.get(file.name):
                error.add_note(f"fetching it ahead of its use had failed too: {earlier}")
            raise

    def index(self, name: str) -> Path:
        """The shard's index, which stays. The first call fetches all indexes that are not here. Errors: as open."""
        if not self._has_indexes:
            _for_each(self._fetch_index, self._indexes.values())
            self._has_indexes = True
        return self._folder.path / self._indexes[name].name

    def place(self, name: str) -> Path:
        """Where the shard is, or would be, on this machine."""
        return self._folder.path / self._shards[name].name

    def check_sizes(self) -> None:
        """Asks the store for the size of each shard. Errors: OSError naming one that is not as it should be."""

        def check(file: _File) -> None:
            size = file_size(file.url, self._config.retry)
            if size not in (None, file.bytes):
                raise OSError(f"{file.url} has {size:,} bytes, the manifest says {file.bytes:,}: upload it again")

        _for_each(check, self._shards.values())

    def plan(self, names: Sequence[str]) -> None:
        """Says which shards will be needed from now on, in that order, in place of what was said before.

        Threads fetch them as far as the limit allows without evicting what comes earlier in the plan. What fails there
        is tried again, and its error raised, when the shard is opened.
        """
        plan = _Plan([self._shards[name] for name in names])
        with self._changed:
            self._plan = plan
            self._failures.clear()
            self._changed.notify_all()
            missing = min(self._config.ahead, len(names)) - len(self._threads)
            # Daemons: the end of the process ends them, and what they leave behind counts for nobody.
            started = [
                threading.Thread(target=_run_ahead, args=(weakref.ref(self),), daemon=True, name="shards ahead")
                for _ in range(missing)
            ]
            self._threads.update(started)
        for thread in started:
            thread.start()

    def close(self) -> None:
        """Ends fetching ahead, until there is a plan again; files that are half fetched go."""
        self.plan([])
        for thread in list(self._threads):
            thread.join(1)  # one that waits for the store goes later, by itself

    @property
    def stats(self) -> CacheStats:
        self._stats.evicted = self._folder.evicted
        return self._stats

    def _start_afresh(self) -> None:
        """State of this process alone: a forked one has none of the threads, and may have locks that they held."""
        self._changed = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._plan = _Plan([])
        self._failures: dict[str, Exception] = {}
        self._stats = CacheStats()
        self._folder.evicted = 0

    def _check_room(self) -> None:
        config, limit = self._config, self._folder.limit_bytes
        shards = [file.bytes for file in self._shards.values()]
        indexes = sum(file.bytes for file in self._indexes.values())
        if (needed := indexes + max(shards, default=0)) > limit:
            raise ValueError(
                f"data.cache.gigabytes is {config.gigabytes:g}, but the indexes and the largest shard have "
                f"{needed / 1e9:.3g} GB: raise it"
            )
        used, free = self._folder.used_and_free()
        if used + free < (needed := min(limit, indexes + sum(shards))):
            raise ValueError(
                f"data.cache.folder {config.folder} may come to {needed / 1e9:.3g} GB, and its disk has "
                f"{(used + free) / 1e9:.3g} GB for it: name a folder on another, or lower data.cache.gigabytes"
            )

    def _count(self, **more: int) -> None:
        with self._changed:
            for name, number in more.items():
                setattr(self._stats, name, getattr(self._stats, name) + number)

    def _fetch_index(self, file: _File) -> None:
        os.close(self._fetched(file))

    def _fetched(self, file: _File, wait: bool = True) -> int:
        """A descriptor of a file, which this or another process fetches, once there is room."""
        deadline = None
        while True:
            descriptor = self._folder.take(file.name, file.bytes)
            if descriptor is not None:
                return descriptor
            with self._folder.named_errors():
                turn = self._folder.begin(file.name, file.bytes, self._plan.worth)
            if isinstance(turn, int):
                return self._fetch(file, turn)
            if turn is Turn.BUSY:
                self._folder.wait(file.name)
            elif turn is Turn.FULL:
                if not wait:
                    raise NoRoom(file.url)
                deadline = deadline or time.monotonic() + self._config.retry.timeout_seconds
                if time.monotonic() > deadline:
                    raise OSError(
                        f"{file.url}: its {file.bytes:,} bytes find no room in data.cache.folder {self._folder.path}, "
                        "whose files are all in use: raise data.cache.gigabytes, or lower data.window"
                    )
                time.sleep(_POLL_SECONDS)

    def _fetch(self, file: _File, descriptor: int, ahead: bool = False) -> int:
        """Fills the temporary that CacheFolder.begin has given; returns a descriptor for reading."""
        try:
            with self._folder.named_errors():
                os.posix_fallocate(descriptor, 0, file.bytes)  # so that a full disk shows before the store is asked
            self._download(file, descriptor, ahead)
            with self._folder.named_errors():
                os.fsync(descriptor)
                whole = self._folder.finish(file.name, descriptor)
        except BaseException:
            self._folder.drop(file.name, descriptor)
            raise
        self._count(fetched=1, fetched_bytes=file.bytes)
        return whole

    def _download(self, file: _File, descriptor: int, ahead: bool) -> None:
        """Errors: OSError where the bytes are not those of the manifest, twice the same or too many times."""
        right, before = _described(file.bytes, file.sha256), None
        for _ in range(self._config.retry.retries + 1):
            found = self._copy(file, descriptor, ahead)
            if found == right:
                return
            if found == before:
                break  # the store has them so
            self._count(retried=1)
            before = found
        raise OSError(
            f"{file.url} has {found}, the manifest says {right}: upload it again, or write it again with "
            "`python -m data_prep shard`"
        )

    def _copy(self, file: _File, descriptor: int, ahead: bool) -> str:
        """Fills the temporary; returns what the store sent, described."""
        digest, size = hashlib.sha256(), 0
        blocks = fetch_blocks(file.url, self._config.retry, lambda: self._count(retried=1))
        with closing(blocks), open(descriptor, "r+b", buffering=0, closefd=False) as part:
            part.seek(0)
            for block in blocks:
                size += len(block)
                if size > file.bytes:
                    return f"more than {file.bytes:,} bytes"
                if ahead and file.name not in self._plan.places:
                    raise _NotNeeded
                digest.update(block)
                with self._folder.named_errors():
                    _write(part.fileno(), block)
        return _described(size, digest.hexdigest() if file.sha256 else None)

    def _step_ahead(self) -> float | None:
        """Fetches the plan's next file. Returns the seconds to wait before the next step; None: that was the last."""
        with self._changed:
            plan = self._plan
            if plan.next == len(plan.files):
                self._threads.discard(threading.current_thread())
                return None
            place = plan.next
            plan.next += 1
        try:
            done = self._fetch_ahead(plan, place)
        except _NotNeeded:
            return 0
        except Exception as error:  # of whatever kind: the same happens where the file is opened, and is raised there
            self._failures[plan.files[place].name] = error
            self._count(failed_ahead=1)
            return 0
        if done:
            return 0
        with self._changed:
            plan.next = min(plan.next, place)
            if len(self._threads) > 1:  # one that looks for room is enough
                self._threads.discard(threading.current_thread())
                return None
        return _AHEAD_POLL_SECONDS

    def _fetch_ahead(self, plan: _Plan, place: int) -> bool:
        """Whether the file is here, or on its way; else there is no room for it."""
        file = plan.files[place]
        turn = self._folder.begin(
            file.name,
            file.bytes,
            lambda name, used: plan.worth(name, used) if plan.places.get(name, place + 1) > place else None,
        )
        if isinstance(turn, int):
            os.close(self._fetch(file, turn, ahead=True))
        return turn is not Turn.FULL


def _run_ahead(reference: weakref.ref[ShardCache]) -> None:
    """A thread's life. It does not keep the cache alive, whose last user may forget to close it."""
    while (cache := reference()) is not None:
        pause = cache._step_ahead()
        if pause is None:
            return
        changed = cache._changed
        del cache
        if pause:
            with changed:
                changed.wait(pause)


def _for_each(work: Callable[[_File], None], files: Iterable[_File]) -> None:
    """Many at once; the first error ends it."""
    pool = ThreadPoolExecutor(_SMALL_REQUESTS, thread_name_prefix="store")
    try:
        list(pool.map(work, files))
    finally:
        pool.shutdown(cancel_futures=True)


def _described(size: int, sha256: str | None) -> str:
    return f"{size:,} bytes" + (f" with sha256 {sha256}" if sha256 else "")


def _write(descriptor: int, block: bytes) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _shard_file(base_url: str, shard: ShardRecord) -> _File:
    name = f"{shard.sha256}.tar" if shard.sha256 else f"unhashed-{shard.index_sha256}.tar"
    return _checked(_File(name, file_url(base_url, shard.name), shard.bytes, shard.sha256))


def _index_file(base_url: str, shard: ShardRecord) -> _File:
    size = INDEX_HEADER.size + shard.samples * INDEX_RECORD.size + INDEX_TRAILER.size
    name = f"{shard.index_sha256}.idx"
    return _checked(_File(name, file_url(base_url, shard.index_name), size, shard.index_sha256))


def _checked(file: _File) -> _File:
    """Names come from a manifest, which a stranger may have written: none may lead out of the folder."""
    if not re.fullmatch(r"(unhashed-)?[0-9a-f]{64}\.(tar|idx)", file.name) or file.bytes < 1:
        raise ValueError(f"{file.url}: the manifest has no sha256 and size of it: do not trust it, and write it again")
    return file


# Shared state of threads must begin anew in a forked process: see _start_afresh.
_caches: weakref.WeakSet[ShardCache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in _caches:
        cache._start_afresh()


os.register_at_fork(after_in_child=_after_fork)
