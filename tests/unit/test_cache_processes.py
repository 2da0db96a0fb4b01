"""The cache shared by processes: one fetch for all, a limit that holds at every moment, and kill -9 at any moment."""

import contextlib
import fcntl
import hashlib
import os
import random
import threading
import time

import pytest
from fault_store import SHARD_BYTES, Children, cache_of, content, fill, until

from pipeline.data.remote import RetryConfig


@pytest.fixture
def children():
    children = Children()
    yield children
    for pid in list(children.pids):
        children.kill(pid)


# Of forked processes that all begin at once, on a core that others use too: a second is soon over.
PATIENT = RetryConfig(retries=3, timeout_seconds=60.0, backoff_seconds=0.01)


def read(store, shards, folder, names, room=100.0) -> None:
    cache = cache_of(store, shards, folder, room, PATIENT)
    for name in names:
        assert content(cache.open(name)) == store.files[name]


def test_processes_that_ask_for_one_shard_make_one_request(store, tmp_path, children):
    shards = fill(store, 2)
    store.pause_seconds = 0.03
    for _ in range(3):
        children.start(lambda: read(store, shards, tmp_path, ["train-0.tar", "train-1.tar"]))
        children.start(lambda: cache_of(store, shards, tmp_path, retry=PATIENT).index("train-0.tar"))
    assert children.all_succeeded()
    assert sorted(name for name, _ in store.requests) == sorted(store.files)


def test_who_waits_takes_over_from_a_process_that_is_killed(store, tmp_path, children):
    shards = fill(store, 1)
    store.pause_seconds = 0.1
    first = children.start(lambda: read(store, shards, tmp_path, ["train-0.tar"]))
    until(lambda: store.requests)
    for _ in range(2):
        children.start(lambda: read(store, shards, tmp_path, ["train-0.tar"]))
    time.sleep(0.2)
    children.kill(first)
    assert children.all_succeeded()
    assert store.asked_for("train-0.tar") == 2
    assert not list(tmp_path.glob(".*.part"))


def test_a_shard_that_a_killed_process_had_open_can_be_evicted(store, tmp_path, children):
    shards = fill(store, 2)
    cache = cache_of(store, shards, tmp_path, room=1.5)

    def hold() -> None:
        cache.open("train-0.tar")
        time.sleep(60)

    reader = children.start(hold)
    held = tmp_path / f"{shards[0].sha256}.tar"
    until(held.exists)
    threading.Timer(0.3, children.kill, [reader]).start()
    assert content(cache.open("train-1.tar")) == store.files["train-1.tar"]
    assert not held.exists()


def kill_at_random_moments(store, folder, children, times: int) -> None:
    chance = random.Random(5)
    shards = fill(store, 4)
    store.pause_seconds = 0.005
    names = [shard.name for shard in shards]
    right = {f"{shard.sha256}.tar": shard.sha256 for shard in shards}
    killed_half_way = 0
    for _ in range(times):
        walk = chance.choices(names, k=50)
        victim = children.start(lambda walk=walk: read(store, shards, folder, walk, room=2.5))
        other = children.start(lambda walk=walk: read(store, shards, folder, walk[:3], room=2.5))
        time.sleep(chance.uniform(0.05, 0.4))
        children.kill(victim)
        killed_half_way += any(folder.glob(".*.part"))
        # What stands under a final name is whole at every moment.
        for path in folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                assert hashlib.sha256(path.read_bytes()).hexdigest() == right[path.name]
        assert os.waitpid(other, 0)[1] == 0
        children.pids.remove(other)
    assert killed_half_way
    read(store, shards, folder, names, room=2.5)
    assert not list(folder.glob(".*.part"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2.5 * SHARD_BYTES + 4 * 44


def test_kill_9_at_random_moments_leaves_nothing_half(store, tmp_path, children):
    kill_at_random_moments(store, tmp_path, children, 10)


@pytest.mark.soak
def test_kill_9_at_200_random_moments(store, tmp_path, children):
    kill_at_random_moments(store, tmp_path, children, 200)


def test_the_limit_holds_at_every_moment(store, tmp_path, children):
    shards = fill(store, 8)
    store.pause_seconds = 0.003
    names = [shard.name for shard in shards]
    limit = cache_of(store, shards, tmp_path, room=3.4)._folder.limit_bytes

    def walk(seed: int) -> None:
        chance = random.Random(seed)
        cache = cache_of(store, shards, tmp_path, room=3.4)
        for _ in range(12):
            order = chance.sample(names, 4)
            cache.plan(order)
            cache.index(order[0])
            held = cache.open(order[0])
            time.sleep(0.02)
            assert content(held) == store.files[order[0]]

    def size() -> int:
        folder = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)  # else a file that is renamed meanwhile is met under both names
        try:
            return sum(path.stat().st_size for path in tmp_path.iterdir())
        finally:
            os.close(folder)

    for seed in range(3):
        children.start(lambda seed=seed: walk(seed))
    sizes = []
    while any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for pid in children.pids):
        sizes.append(size())
        time.sleep(0.002)
    assert children.all_succeeded()
    assert max(sizes) <= limit
    assert max(sizes) > 2 * SHARD_BYTES and len(sizes) > 100
    fetched = sum(store.asked_for(name) for name in names)
    assert fetched > len(names)  # there was eviction
