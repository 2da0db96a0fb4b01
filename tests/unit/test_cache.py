"""The cache of a store's shards in one process: faults of the store and of the disk, room, fetching ahead."""

import errno
import hashlib
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from fault_store import HASTY, SHARD_BYTES, Children, FaultStore, cache_of, content, fill, until

from pipeline.data import remote
from pipeline.data.cache import CacheConfig, ShardCache


def whole(folder) -> set[str]:
    return {path.name for path in folder.glob("*.tar")}


def parts(folder) -> list[str]:
    return [path.name for path in folder.glob(".*.part")]


def test_a_shard_is_fetched_once_and_found_again(store, tmp_path):
    shards = fill(store, 2)
    cache = cache_of(store, shards, tmp_path)
    for _ in range(2):
        assert content(cache.open("train-1.tar")) == store.files["train-1.tar"]
    again = cache_of(store, shards, tmp_path)
    assert content(again.open("train-1.tar")) == store.files["train-1.tar"]
    assert store.asked_for("train-1.tar") == 1
    assert (cache.stats.fetched, cache.stats.fetched_bytes, cache.stats.hits) == (1, SHARD_BYTES, 1)
    assert again.stats.hits == 1
    assert whole(tmp_path) == {f"{shards[1].sha256}.tar"} and not parts(tmp_path)


def test_indexes_are_fetched_together_and_checked(store, tmp_path):
    shards = fill(store, 20)
    cache = cache_of(store, shards, tmp_path)
    for shard in shards:
        assert cache.index(shard.name).read_bytes() == store.files[shard.index_name]
    assert all(store.asked_for(shard.index_name) == 1 for shard in shards)
    store.files[shards[3].index_name] = b"x" * len(store.files[shards[3].index_name])
    with pytest.raises(OSError, match=r"train-3\.idx has 44 bytes with sha256 .* upload it again"):
        cache_of(store, shards, tmp_path / "other").index("train-0.tar")


@pytest.mark.parametrize("faults", [[503, 500], ["cut"], ["cut", 503, "cut"], ["stall"], ["dumb"], [429]])
def test_faults_that_pass_are_met_by_retries(store, tmp_path, faults):
    shards = fill(store, 1)
    store.faults["train-0.tar"] = list(faults)
    cache = cache_of(store, shards, tmp_path)
    assert content(cache.open("train-0.tar")) == store.files["train-0.tar"]
    assert cache.stats.retried == len(faults) == store.asked_for("train-0.tar") - 1


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_cut_shard_goes_on_where_it_was_cut(store, tmp_path, monkeypatch, knows_ranges):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 20_000)  # so that blocks have come before the cut
    shards = fill(store, 1)
    store.knows_ranges = knows_ranges
    store.pause_seconds = 0.02
    store.faults["train-0.tar"] = ["cut"]
    assert content(cache_of(store, shards, tmp_path).open("train-0.tar")) == store.files["train-0.tar"]
    assert len(store.requests) == 2
    start = int(store.requests[1][1].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= SHARD_BYTES // 2


def test_wrong_bytes_once_are_fetched_again(store, tmp_path):
    shards = fill(store, 1)
    store.faults["train-0.tar"] = ["wrong"]
    cache = cache_of(store, shards, tmp_path)
    assert content(cache.open("train-0.tar")) == store.files["train-0.tar"]
    assert cache.stats.retried == 1


def test_a_shard_that_stays_wrong_is_named_with_both_hashes(store, tmp_path):
    shards = fill(store, 1)
    store.always["train-0.tar"] = "wrong"
    data = store.files["train-0.tar"]
    found = hashlib.sha256(data[:-1] + bytes([data[-1] ^ 1])).hexdigest()
    with pytest.raises(
        OSError, match=rf"train-0\.tar has 300,000 bytes with sha256 {found}.*{shards[0].sha256}.*upload"
    ):
        cache_of(store, shards, tmp_path).open("train-0.tar")
    assert store.asked_for("train-0.tar") == 2  # the same twice is no accident
    assert not whole(tmp_path) and not parts(tmp_path)


@pytest.mark.parametrize(("length", "found"), [(200_000, "200,000 bytes"), (400_000, "more than 300,000 bytes")])
def test_a_shard_of_another_size_is_named(store, tmp_path, length, found):
    shards = fill(store, 1)
    store.files["train-0.tar"] = (store.files["train-0.tar"] * 2)[:length]
    cache = cache_of(store, [replace(shards[0], sha256=None)], tmp_path)
    with pytest.raises(OSError, match=rf"train-0\.tar has {found}, the manifest says 300,000 bytes: upload"):
        cache.open("train-0.tar")
    assert not whole(tmp_path) and not parts(tmp_path)


@pytest.mark.parametrize(
    ("fault", "kind", "message", "asked"),
    [
        (404, FileNotFoundError, "is missing: check the URL", 1),
        (403, PermissionError, "may not be read .*credentials", 1),
        (401, PermissionError, "may not be read .*credentials", 1),
        (400, OSError, "cannot be read .*400", 1),
        (503, OSError, "could not be read in 4 tries, the last: .*503.*data.cache.retry", 4),
        # For one without an answer aiohttp itself asks again.
        ("reset", OSError, "could not be read in 4 tries, the last: .*see that the store answers", 8),
    ],
)
def test_faults_that_stay_end_in_one_message(store, tmp_path, fault, kind, message, asked):
    shards = fill(store, 1)
    store.always["train-0.tar"] = fault
    with pytest.raises(kind, match=rf"{store.url}/train-0\.tar {message}"):
        cache_of(store, shards, tmp_path).open("train-0.tar")
    assert store.asked_for("train-0.tar") == asked
    assert not whole(tmp_path) and not parts(tmp_path)


def test_a_changed_shard_of_the_same_name_is_another_file(store, tmp_path):
    shards = fill(store, 1)
    os.close(cache_of(store, shards, tmp_path).open("train-0.tar"))
    store.files["train-0.tar"] = data = b"new" * 1000
    changed = replace(shards[0], bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert content(cache_of(store, [changed], tmp_path).open("train-0.tar")) == data


def test_a_cached_file_of_the_wrong_size_is_fetched_again(store, tmp_path):
    shards = fill(store, 1)
    cache = cache_of(store, shards, tmp_path)
    os.close(cache.open("train-0.tar"))
    os.truncate(tmp_path / f"{shards[0].sha256}.tar", 1000)
    assert content(cache.open("train-0.tar")) == store.files["train-0.tar"]


def test_what_a_dead_process_left_does_not_count(store, tmp_path):
    shards = fill(store, 2)
    for shard in shards:
        (tmp_path / f".{shard.sha256}.tar.part").write_bytes(b"x" * SHARD_BYTES)
    cache = cache_of(store, shards, tmp_path, room=1.2)
    assert content(cache.open("train-0.tar")) == store.files["train-0.tar"]
    assert not parts(tmp_path)


@pytest.mark.parametrize("total", [None, b"", b"9" * 20])
def test_a_total_that_is_lost_or_too_high_is_counted_again(store, tmp_path, total):
    shards = fill(store, 4)
    cache = cache_of(store, shards, tmp_path, room=3)
    for name in ("train-0.tar", "train-1.tar", "train-2.tar"):
        os.close(cache.open(name))
    (tmp_path / f"{shards[1].sha256}.tar").unlink()  # a user's doing
    if total is None:
        (tmp_path / ".total").unlink()
    else:
        (tmp_path / ".total").write_bytes(total)
    os.close(cache.open("train-3.tar"))
    assert whole(tmp_path) == {f"{shards[i].sha256}.tar" for i in (0, 2, 3)} and cache.stats.evicted == 0
    os.close(cache.open("train-1.tar"))
    assert len(whole(tmp_path)) == 3 and cache.stats.evicted == 1


def test_the_least_lately_used_goes_first_and_open_files_stay(store, tmp_path):
    shards = fill(store, 5)
    cache = cache_of(store, shards, tmp_path, room=3)
    os.close(cache.open("train-0.tar"))
    held = cache.open("train-0.tar")  # found, not fetched
    for name in ("train-1.tar", "train-2.tar", "train-1.tar", "train-3.tar"):
        os.close(cache.open(name))
    assert whole(tmp_path) == {f"{shards[i].sha256}.tar" for i in (0, 1, 3)}
    os.close(cache.open("train-4.tar"))
    assert whole(tmp_path) == {f"{shards[i].sha256}.tar" for i in (0, 3, 4)}
    assert content(held) == store.files["train-0.tar"]
    os.close(cache.open("train-1.tar"))
    assert whole(tmp_path) == {f"{shards[i].sha256}.tar" for i in (1, 3, 4)}
    assert cache.stats.evicted == 3


def test_a_limit_that_was_lowered_holds_from_the_start(store, tmp_path):
    shards = fill(store, 4)
    cache = cache_of(store, shards, tmp_path)
    for shard in shards:
        os.close(cache.open(shard.name))
    cache_of(store, shards, tmp_path, room=2)
    assert whole(tmp_path) == {f"{shards[i].sha256}.tar" for i in (2, 3)}


def test_files_of_others_in_the_folder_are_left_alone(store, tmp_path):
    (tmp_path / "thesis.tar").write_bytes(b"x" * 10 * SHARD_BYTES)
    shards = fill(store, 3)
    cache = cache_of(store, shards, tmp_path, room=1)
    for shard in shards:
        os.close(cache.open(shard.name))
    assert (tmp_path / "thesis.tar").stat().st_size == 10 * SHARD_BYTES


def test_no_room_while_all_is_in_use_names_the_limit(store, tmp_path):
    shards = fill(store, 2)
    cache = cache_of(store, shards, tmp_path, room=1.5, retry=replace(HASTY, timeout_seconds=0.2))
    held = cache.open("train-0.tar")
    with pytest.raises(OSError, match=r"train-1\.tar: its 300,000 bytes find no room .*raise data\.cache\.gigabytes"):
        cache.open("train-1.tar")
    os.close(held)
    os.close(cache.open("train-1.tar"))


def test_a_plan_is_fetched_ahead_as_far_as_the_limit_lets_it(store, tmp_path):
    shards = fill(store, 6)
    cache = cache_of(store, shards, tmp_path, room=3)
    os.close(cache.open("train-5.tar"))
    cache.plan([f"train-{i}.tar" for i in range(5)])
    until(lambda: whole(tmp_path) == {f"{shards[i].sha256}.tar" for i in range(3)})
    assert content(cache.open("train-0.tar")) == store.files["train-0.tar"]
    assert cache.stats.hits == 1
    cache.plan(["train-3.tar", "train-4.tar"])
    until(lambda: whole(tmp_path) >= {f"{shards[i].sha256}.tar" for i in (3, 4)})
    assert [store.asked_for(f"train-{i}.tar") for i in range(6)] == [1] * 6
    cache.close()


def test_what_failed_ahead_is_tried_again_and_then_raised(store, tmp_path):
    shards = fill(store, 2)
    store.faults["train-0.tar"] = [404]
    store.always["train-1.tar"] = 404
    cache = cache_of(store, shards, tmp_path)
    cache.plan(["train-0.tar", "train-1.tar"])
    until(lambda: cache.stats.failed_ahead == 2)
    assert content(cache.open("train-0.tar")) == store.files["train-0.tar"]
    with pytest.raises(FileNotFoundError) as caught:
        cache.open("train-1.tar")
    assert "ahead of its use had failed too" in caught.value.__notes__[0]
    assert store.asked_for("train-1.tar") == 2


def test_close_ends_fetching_ahead(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 20_000)
    shards = fill(store, 4)
    store.pause_seconds = 0.05
    cache = cache_of(store, shards, tmp_path)
    cache.plan([shard.name for shard in shards])
    until(lambda: store.requests)
    cache.close()
    until(lambda: not parts(tmp_path))
    assert not cache._threads and not whole(tmp_path)


def test_a_forked_process_goes_on(store, tmp_path):
    shards = fill(store, 3)
    store.pause_seconds = 0.02
    cache = cache_of(store, shards, tmp_path)
    cache.plan(["train-0.tar"])  # a thread is under way, which the fork does not copy
    children = Children()

    def go_on() -> None:
        cache.plan(["train-1.tar"])
        until(lambda: cache.stats.fetched)
        assert all(content(cache.open(shard.name)) == store.files[shard.name] for shard in shards)

    children.start(go_on)
    assert children.all_succeeded()
    assert all(store.asked_for(shard.name) == 1 for shard in shards)


def test_other_stores_of_fsspec(tmp_path):
    store = FaultStore()
    shards = fill(store, 2, 50_000)
    source = tmp_path / "store"
    source.mkdir()
    for name, data in store.files.items():
        (source / name).write_bytes(data)
    store.url = f"file://{source}"
    cache = cache_of(store, shards, tmp_path / "cache")
    cache.index("train-0.tar")
    assert content(cache.open("train-1.tar")) == store.files["train-1.tar"]
    (source / "train-0.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"file://.*train-0\.tar is missing"):
        cache.open("train-0.tar")


def test_settings_that_cannot_work_are_refused(store, tmp_path):
    shards = fill(store, 3)
    with pytest.raises(ValueError, match=r"data\.cache\.gigabytes is 0\.0001, but .* largest shard have 0\.0003 GB"):
        ShardCache(store.url, shards, CacheConfig(tmp_path, 1e-4))
    with pytest.raises(ValueError, match=r"data\.cache\.gigabytes is 0"):
        CacheConfig(gigabytes=0)
    with pytest.raises(ValueError, match=r"data\.cache\.ahead is -1"):
        CacheConfig(ahead=-1)
    huge = [replace(shard, bytes=10**16, sha256=f"{i:064x}") for i, shard in enumerate(shards)]
    with pytest.raises(ValueError, match=r"may come to 3e\+07 GB, and its disk has .* lower data\.cache\.gigabytes"):
        ShardCache(store.url, huge, CacheConfig(tmp_path, 1e12))
    with pytest.raises(ValueError, match="do not trust it"):
        ShardCache(store.url, [replace(shards[0], sha256="../" * 20 + "etc")], CacheConfig(tmp_path, 1))


def test_a_folder_that_cannot_be_written_is_named(store, tmp_path):
    shards = fill(store, 1)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"data\.cache\.folder .*file/cache: Not a directory .*bytes are free"):
        cache_of(store, shards, tmp_path / "file" / "cache")
    # Root writes anywhere but into /proc.
    with pytest.raises(OSError, match=r"data\.cache\.folder /proc/self: .*name a folder"):
        ShardCache(store.url, shards, CacheConfig(Path("/proc/self"), 1))


def test_a_full_disk_is_one_message_and_leaves_nothing(store, tmp_path, monkeypatch):
    shards = fill(store, 1)
    cache = cache_of(store, shards, tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = r"No space left .* bytes are free there\).*make room"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=message):
        patch.setattr(os, "posix_fallocate", full)
        cache.open("train-0.tar")
    assert store.asked_for("train-0.tar") == 0 and not parts(tmp_path)
    assert content(cache.open("train-0.tar")) == store.files["train-0.tar"]


def test_a_disk_that_fails_while_a_shard_comes_is_not_taken_for_the_store(store, tmp_path):
    shards = fill(store, 1)
    cache = cache_of(store, shards, tmp_path)
    children = Children()

    def fail() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES // 2, SHARD_BYTES // 2))
        with pytest.raises(OSError, match=r"data\.cache\.folder .*: File too large"):
            cache.open("train-0.tar")

    children.start(fail)
    assert children.all_succeeded()
    assert not whole(tmp_path) and not parts(tmp_path)
