"""A store with faults: a web server on this machine, in threads of the test's process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from data_prep.manifest import IndexEntry, ShardRecord, pack_index
from pipeline.data.cache import CacheConfig, ShardCache
from pipeline.data.remote import RetryConfig

# 1 s is the shortest that fsspec keeps to.
HASTY = RetryConfig(retries=3, timeout_seconds=1.0, backoff_seconds=0.01)
SHARD_BYTES = 300_000


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # of a client that was killed
            super().handle_error(request, client_address)


class FaultStore:
    """Serves `files` by name. A fault befalls one request each; those of `always` befall every one of a name.

    A fault is an HTTP status, or: `cut` (the connection ends in the middle of the body), `stall` (nothing comes after
    the middle), `dumb` (no answer), `reset` (the connection ends with none), `wrong` (one bit of the body is another).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.always: dict[str, int | str] = {}
        self.requests: list[tuple[str, str | None]] = []  # (name, its Range)
        self.knows_ranges = True
        self.pause_seconds = 0.0  # after each 32 KB
        self.url = ""
        self._lock = threading.Lock()
        self._ending = threading.Event()

    def asked_for(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.requests)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    store._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}/data"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield
        finally:
            self._ending.set()
            server.shutdown()
            server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        name, asked = handler.path.removeprefix("/data/"), handler.headers.get("Range")
        with self._lock:
            self.requests.append((name, asked))
            fault = self.faults[name].pop(0) if self.faults[name] else self.always.get(name)
        if isinstance(fault, int) or name not in self.files:
            handler.send_response(fault if isinstance(fault, int) else 404)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault in ("dumb", "reset"):
            self._ending.wait(30 if fault == "dumb" else 0)
            handler.close_connection = True
            return
        body, start = self.files[name], 0
        if fault == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if asked and self.knows_ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        end = start + (len(body) - start) // 2 if fault in ("cut", "stall") else len(body)
        for first in range(start, end, 1 << 15):
            handler.wfile.write(body[first : min(first + (1 << 15), end)])
            time.sleep(self.pause_seconds)
        if fault == "stall":
            self._ending.wait(30)
        handler.close_connection = fault in ("cut", "stall")


def fill(store: FaultStore, count: int, size: int = SHARD_BYTES) -> list[ShardRecord]:
    """Puts shards of random bytes and their indexes into a store."""
    shards = []
    for number in range(count):
        data = np.random.default_rng(number).bytes(size)
        index = pack_index([IndexEntry(512, size - 512, number, 0)])
        shards.append(
            ShardRecord(
                f"train-{number}.tar", 1, size, hashlib.sha256(data).hexdigest(), hashlib.sha256(index).hexdigest()
            )
        )
        store.files[shards[-1].name], store.files[shards[-1].index_name] = data, index
    return shards


def cache_of(
    store: FaultStore,
    shards: list[ShardRecord],
    folder: Path,
    room: float = 100,
    retry: RetryConfig = HASTY,
    ahead: int = 2,
) -> ShardCache:
    """room: for how many shards."""
    index_bytes = sum(len(store.files[shard.index_name]) for shard in shards)
    gigabytes = (room * shards[0].bytes + index_bytes) / 1e9
    return ShardCache(store.url, shards, CacheConfig(folder, gigabytes, ahead, retry))


def content(descriptor: int) -> bytes:
    """Reads and closes a file that a cache has opened."""
    with open(descriptor, "rb") as file:
        return file.read()


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.005)


class Children:
    """Forked processes; one that raises ends with status 1."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def start(self, work: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work()
                status = 0
            except BaseException:
                traceback.print_exc()  # nobody else will say why
            finally:
                sys.stderr.flush()
                os._exit(status)
        self.pids.append(pid)
        return pid

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.pids.remove(pid)

    def all_succeeded(self) -> bool:
        pids, self.pids = self.pids, []
        return [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(pids)
