"""Files of a store: which URLs a run reads, what is tried again, and what an answer may cost."""

import asyncio
import sys
import time

import fsspec
import pytest
from fault_store import HASTY
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from pipeline.data import remote
from pipeline.data.remote import RetryConfig, checked_url, fetch_blocks, fetch_bytes, file_url, is_url


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()


def test_urls_and_paths_are_told_apart():
    assert is_url("s3://bucket/train.manifest.json") and is_url("file:///a")
    assert not is_url("/a/b.json") and not is_url("b.json")


@pytest.mark.parametrize("url", ["http://[::1]:8000/data", "https://host/data", "memory://data", "file:///data"])
def test_urls_that_are_allowed(url):
    assert checked_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "pipe:curl http://host/a",
        "pipe://cat a",
        "ssh://host/a",
        "github://org:repo@main/a",
        "simplecache::https://host/a",
        "zip://a::https://host/b.zip",
        "ftp://host/a",
        "local_script.py",
        "HTTP\n://host/a",
    ],
)
def test_urls_that_are_not_allowed_are_told_what_is(url):
    with pytest.raises(ValueError, match=r"a run reads no .*begins with one of http, https, s3"):
        checked_url(url)


def test_what_follows_a_scheme_is_no_further_file_system(store, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    with pytest.raises(FileNotFoundError, match="is missing"):
        fetch_bytes(f"{store.url}/a::file://{tmp_path}/secret", HASTY, 100)
    assert len(store.requests) == 1


@pytest.mark.parametrize("url", ["https://me:hunter2@host/a", "https://host/a?key=hunter2", "https://host/a#hunter2"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="fsspec's configuration") as caught:
        checked_url(url)
    assert "hunter2" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    remote._shared_file_system.cache_clear()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3://bucket/a: .*s3fs.*pip install"):
        checked_url("s3://bucket/a")


def test_names_are_quoted_for_web_servers_alone(store):
    assert file_url("s3://bucket/a/", "x?y#z.tar") == "s3://bucket/a/x?y#z.tar"
    store.files["x%3Fy%23z%20%25.tar"] = b"data"
    assert fetch_bytes(file_url(store.url, "x?y#z %.tar"), HASTY, 10) == b"data"


@pytest.mark.parametrize("faults", [[], [503], ["cut", 500, "cut"], ["reset", "dumb"]])
def test_a_file_is_fetched_from_its_start_at_each_try(store, faults):
    store.files["a.json"] = bytes(200_000)
    store.faults["a.json"] = list(faults)
    assert fetch_bytes(f"{store.url}/a.json", HASTY, 200_000) == bytes(200_000)
    assert store.requests == [("a.json", None)] * (len(faults) + 1)


def test_a_file_beyond_the_limit_is_not_read_to_its_end(store, memory, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 10_000)
    store.files["a"] = bytes(50_000_000)
    memory.pipe_file("/a", bytes(50_000_000))
    blocks = []
    plain = remote._blocks
    monkeypatch.setattr(remote, "_blocks", lambda *args: (blocks.append(b) or b for b in plain(*args)))
    for url in (f"{store.url}/a", "memory://a"):
        blocks.clear()
        with pytest.raises(ValueError, match=r"/a has more than the 100,000 bytes"):
            fetch_bytes(url, HASTY, 100_000)
        assert sum(map(len, blocks)) <= 110_000


def test_a_missing_file_is_named(store, memory, tmp_path):
    for url in (f"{store.url}/a", "memory://a", f"file://{tmp_path}/a"):
        with pytest.raises(FileNotFoundError, match=rf"{url} is missing: check the URL"):
            fetch_bytes(url, HASTY, 100)


def test_blocks_of_any_store(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 1000)
    data = bytes(range(250)) * 10
    memory.pipe_file("/a", data)
    (tmp_path / "a").write_bytes(data)
    for url in ("memory://a", f"file://{tmp_path}/a"):
        assert [len(block) for block in fetch_blocks(url, HASTY)] == [1000, 1000, 500]
        assert b"".join(fetch_blocks(url, HASTY)) == data


class Flaky(AsyncFileSystemWrapper):
    """An asynchronous store, as those of clouds are: some reads stall, fail, or are short."""

    def __init__(self, fs, faults: list[str]) -> None:
        super().__init__(fs=fs, asynchronous=False)
        self.faults = faults
        self._cat_file = self._read_with_faults

    async def _read_with_faults(self, path, start=None, end=None, **kwargs):
        match self.faults.pop(0) if self.faults else "none":
            case "stall":
                await asyncio.sleep(60)
            case "fail":
                raise ConnectionResetError("by peer")
            case "short":
                end -= 1
        return self.sync_fs.cat_file(path, start=start, end=end)


@pytest.mark.parametrize("faults", [["stall"], ["none", "fail", "none", "short"], ["short"] * 3])
def test_an_asynchronous_store_goes_on_where_it_failed(memory, monkeypatch, faults):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 1000)
    data = bytes(range(250)) * 10
    memory.pipe_file("/a", data)
    fs = Flaky(memory, list(faults))
    monkeypatch.setattr(remote, "_file_system", lambda url: fs)
    retries = []
    assert b"".join(fetch_blocks("memory://a", HASTY, lambda: retries.append(1))) == data
    assert len(retries) == len(faults) - faults.count("none")


def test_pauses_double_and_vary(store, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    store.always["a"] = 503
    store.files["a"] = b"a"
    for _ in range(2):
        with pytest.raises(OSError, match="could not be read in 9 tries"):
            fetch_bytes(f"{store.url}/a", RetryConfig(8, 1.0, 0.5), 10)
    first, second = pauses[:8], pauses[8:]
    for pause, most in zip(first, (0.5, 1, 2, 4, 8, 16, 30, 30), strict=True):
        assert most / 2 <= pause <= most
    assert first != second


@pytest.mark.parametrize(
    ("options", "name"),
    [({"retries": -1}, "retries"), ({"timeout_seconds": 0}, "timeout_seconds"), ({"backoff_seconds": 0}, "backoff")],
)
def test_settings_out_of_range_are_named(options, name):
    with pytest.raises(ValueError, match=rf"data\.cache\.retry\.{name}"):
        RetryConfig(**options)
