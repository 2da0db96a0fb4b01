"""Files of a store that fsspec reads (a web server, S3, Google, Azure, Hugging Face), block by block.

Each block has a time limit, and a fault that may pass is tried again from where it struck. Credentials and endpoints
are fsspec's own configuration, never part of a URL, which is written into logs and checkpoints.
"""

from __future__ import annotations

import functools
import os
import random
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

SCHEMES = ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory", "file", "local")

_BLOCK_BYTES = 4 << 20  # in memory for each file that is being fetched, twice while it is put together
_LONGEST_PAUSE_SECONDS = 30.0
_PASSING_STATUS = (408, 425, 429)  # of 4xx, those that say "later"
_FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, TypeError)

Result = TypeVar("Result")


@dataclass(frozen=True)
class RetryConfig:
    """Patience with a store."""

    retries: int = 5
    """After a fault that may pass: 5xx, a connection cut, a time-out, wrong bytes. Not after 404 or 403."""
    timeout_seconds: float = 60.0
    """The longest wait for a store's answer, and for each 4 MB that follow it."""
    backoff_seconds: float = 0.5
    """Pause before the first retry; it doubles, up to 30 s, and is shorter by up to a half, by chance."""

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ValueError(f"data.cache.retry.retries is {self.retries}: at least 0")
        for name in ("timeout_seconds", "backoff_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"data.cache.retry.{name} is {getattr(self, name)}: give seconds, more than 0")


def is_url(path: str) -> bool:
    return "://" in path


def checked_url(url: str) -> str:
    """The URL itself. Errors: ValueError where it is not one that a run may read, or fsspec lacks a package for it."""
    scheme = url.partition("://")[0]
    if not is_url(url) or scheme not in SCHEMES:
        raise ValueError(
            f"{url}: a run reads no {scheme!r}; give a path, or a URL that begins with one of {', '.join(SCHEMES)}"
        )
    place = urllib.parse.urlsplit(url)
    if place.password is not None:
        shown = f"{scheme}://...@{place.netloc.rpartition('@')[2]}{place.path}"
        raise ValueError(f"{shown}: a password in a URL would be written into logs; put it into fsspec's configuration")
    if scheme in ("http", "https") and (place.query or place.fragment):
        shown = url.partition("?")[0].partition("#")[0]
        raise ValueError(f"{shown}: a URL with ? or # names no folder; put credentials into fsspec's configuration")
    try:
        _file_system(url)
    except ImportError as error:
        raise ValueError(f"{url}: {error} (pip install it into this environment)") from error
    return url


def file_url(folder: str, name: str) -> str:
    """The URL of a file in a folder. Web servers get the name quoted, so that ? and # in it have no meaning."""
    quoted = urllib.parse.quote(name) if folder.startswith(("http://", "https://")) else name
    return f"{folder.rstrip('/')}/{quoted}"


def file_size(url: str, retry: RetryConfig) -> int | None:
    """Bytes of a file; None where the store does not say. Errors: as fetch_blocks."""
    fs = _file_system(url)
    path = fs._strip_protocol(url)
    return _retried(lambda: _call(fs, "info", retry.timeout_seconds, path)["size"], url, retry)


def fetch_bytes(url: str, retry: RetryConfig, limit: int) -> bytes:
    """A whole file. Errors: as fetch_blocks; ValueError where it has more than `limit` bytes, at most 4 MB later."""

    def whole() -> bytes:
        # From its start at each try: a file that is replaced meanwhile must not be put together from two.
        data = bytearray()
        for block in _blocks(url, 0, retry.timeout_seconds):
            data += block
            if len(data) > limit:
                break
        return bytes(data)

    data = _retried(whole, url, retry)
    if len(data) > limit:
        raise ValueError(f"{url} has more than the {limit:,} bytes that such a file may have: check the URL")
    return data


def fetch_blocks(
    url: str, retry: RetryConfig, on_retry: Callable[[], None] = lambda: None
) -> Generator[bytes, None, None]:
    """The blocks of a file. It may be replaced while it is read: whoever asks must check the bytes.

    A fault is met by going on at the byte where it struck, and the count of retries begins anew with each block.
    Errors: FileNotFoundError, PermissionError, else OSError, with the URL, the reason and the mend.
    """
    received = 0
    rest: Iterator[bytes] | None = None

    def following() -> bytes:
        nonlocal rest
        try:
            if rest is None:
                rest = _blocks(url, received, retry.timeout_seconds)
            return next(rest, b"")
        except Exception:
            rest = None
            raise

    while block := _retried(following, url, retry, on_retry):
        received += len(block)
        yield block


def _retried(
    step: Callable[[], Result], url: str, retry: RetryConfig, on_retry: Callable[[], None] = lambda: None
) -> Result:
    # Not Python's or torch's global generator: a fault of the store would change what the run draws.
    chance = random.SystemRandom()
    tries = 0
    while True:
        try:
            return step()
        except Exception as error:
            tries += 1
            if tries > retry.retries or not _may_pass(error):
                raise _named(error, url, tries) from error
        on_retry()
        pause = min(retry.backoff_seconds * 2 ** (tries - 1), _LONGEST_PAUSE_SECONDS)
        time.sleep(pause * chance.uniform(0.5, 1.0))


def _status(error: Exception) -> int | None:
    """The HTTP status in an error: stores' libraries call it by these names."""
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((status for status in found if isinstance(status, int)), None)


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status in _PASSING_STATUS
    return not isinstance(error, _FINAL_ERRORS)


def _named(error: Exception, url: str, tries: int) -> OSError:
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url} is missing: check the URL, or upload it again")
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return PermissionError(f"{url} may not be read ({reason}): check the credentials in fsspec's configuration")
    if not _may_pass(error):
        return OSError(f"{url} cannot be read ({reason}): check the URL and fsspec's configuration")
    return OSError(
        f"{url} could not be read in {tries} tries, the last: {reason}; see that the store answers, "
        "or raise data.cache.retry.retries or timeout_seconds; then start the same command, which goes on"
    )


def _file_system(url: str) -> Any:
    """fsspec's file system for a URL; never a chain of several, which could reach other places than the URL's own."""
    scheme, _, rest = url.partition("://")
    return _shared_file_system(scheme, rest.partition("/")[0], os.getpid())


@functools.lru_cache(maxsize=16)
def _shared_file_system(scheme: str, host: str, process: int) -> Any:
    """One for all threads of a process. fsspec itself keeps one for each thread, with its connections, for ever."""
    import fsspec  # 0.1 s, and only stores need it

    kind = fsspec.get_filesystem_class(scheme)
    options = kind._get_kwargs_from_urls(f"{scheme}://{host}/")
    return kind(skip_instance_cache=True, **options)


def _blocks(url: str, start: int, timeout: float) -> Iterator[bytes]:
    """A file's bytes from `start` to its end, each block within `timeout` seconds. Errors: the store's own."""
    read = _web_blocks if url.startswith(("http://", "https://")) else _range_blocks
    yield from read(_file_system(url), url, start, timeout)


def _range_blocks(fs: Any, url: str, start: int, timeout: float) -> Iterator[bytes]:
    path = fs._strip_protocol(url)
    size = _call(fs, "info", timeout, path)["size"]
    for first in range(start, size, _BLOCK_BYTES):
        last = min(first + _BLOCK_BYTES, size)
        block = _call(fs, "cat_file", timeout, path, start=first, end=last)
        if len(block) != last - first:
            raise EOFError(f"{len(block):,} bytes came of the {last - first:,} from {first:,} on")
        yield block


def _call(fs: Any, name: str, timeout: float, *arguments: Any, **options: Any) -> Any:
    """A method of a file system; those of networks are asynchronous, and can be cut off."""
    if not fs.async_impl:
        return getattr(fs, name)(*arguments, **options)
    from fsspec.asyn import sync

    return sync(fs.loop, getattr(fs, f"_{name}"), *arguments, timeout=timeout, **options)


def _web_blocks(fs: Any, url: str, start: int, timeout: float) -> Iterator[bytes]:
    """One GET, read as it comes: a server need not know ranges, and what it sends is never held whole."""
    from fsspec.asyn import sync

    answer = sync(fs.loop, _get, fs, url, start, timeout=timeout)
    try:
        if answer.status == 416 and start:
            return  # there is nothing after `start`
        if answer.status == 404:
            raise FileNotFoundError(url)
        answer.raise_for_status()
        passed = start if answer.status == 206 else 0  # a server without ranges begins again
        while block := sync(fs.loop, _read, answer.content, timeout=timeout):
            passed += len(block)
            if passed > start:
                yield block[max(0, len(block) - (passed - start)) :]
    finally:
        fs.loop.call_soon_threadsafe(answer.close)


async def _get(fs: Any, url: str, start: int) -> Any:
    import aiohttp

    session = await fs.set_session()
    # Of compressed bytes "from `start` on" would mean another place.
    headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    # aiohttp's own limit is 300 s for the whole answer, however well it comes in.
    options = {"timeout": aiohttp.ClientTimeout(total=None), **fs.kwargs, "headers": headers}
    return await session.get(fs.encode_url(url), **options)


async def _read(content: Any) -> bytes:
    parts: list[bytes] = []
    size = 0
    try:
        while size < _BLOCK_BYTES and (part := await content.read(_BLOCK_BYTES - size)):
            parts.append(part)
            size += len(part)
    except Exception:
        if not parts:  # else what has come counts, and the next read meets the same error
            raise
    return b"".join(parts)
