"""Sources and targets in an object store: the same shards as on a disk.

`memory://` is a store inside the process; `local://` is a disk that fsspec reads as a store, so that worker processes
meet the code that s3:// and gs:// take.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from source_pictures import contents, shard_source

from data_prep.finalize import FinalizeOptions, finalize
from data_prep.manifest import atomic_file, remove_orphans
from data_prep.sources.image_folder import ImageFolder, RemoteImageFolder
from data_prep.storage import LocalFolder, RemoteFolder, file_system, open_file, open_folder
from data_prep.verify import VerifyOptions, verify


@pytest.fixture
def store():
    """A fresh memory:// store."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


def upload(folder: Path, url: str) -> str:
    fs, root = file_system(url)
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())
    return url


def in_store(fs, url: str) -> dict[str, bytes]:
    root = fs._strip_protocol(url)
    return {path[len(root) + 1 :]: fs.cat_file(path) for path in sorted(fs.find(root))}


def test_urls_and_paths_are_told_apart(tmp_path):
    assert open_folder(tmp_path) == open_folder(f"file://{tmp_path}") == LocalFolder(tmp_path)
    assert open_folder("memory://a/b/") == RemoteFolder("memory://a/b")
    assert open_file("memory://a/b.json") == (RemoteFolder("memory://a"), "b.json")
    assert open_file("b.json") == (LocalFolder(Path(".")), "b.json")
    assert open_file("/b.json") == (LocalFolder(Path("/")), "b.json")
    with pytest.raises(ValueError, match=r"nostore://a.*URL that fsspec knows"):
        open_folder("nostore://a").read("b")


def test_a_store_whose_package_is_missing_says_so():
    pytest.importorskip("fsspec")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"s3://bucket.*[Ii]nstall s3fs"):
            open_folder("s3://bucket").read("b")


@pytest.mark.parametrize("url", ["memory://target", "disk"])
def test_a_folder_does_what_it_says_wherever_it_is(store, tmp_path, url):
    folder = open_folder(tmp_path / "target" if url == "disk" else url)
    assert folder.names("*") == [] and folder.size("a.tar") is None
    with folder.file("a.tar") as file:
        file.write(b"12345")
    with folder.file(".sub/b.json") as file:
        file.write(b"{}")
    assert folder.size("a.tar") == 5 and folder.read("a.tar") == b"12345"
    assert folder.names("*.tar") == ["a.tar"] and folder.names(".sub/*.json") == [".sub/b.json"]
    with folder.local("a.tar") as path:
        assert path.read_bytes() == b"12345"
    with pytest.raises(RuntimeError), folder.file("a.tar") as file:
        file.write(b"other")
        raise RuntimeError
    assert folder.read("a.tar") == b"12345"
    folder.remove("a.tar")
    folder.remove("a.tar")
    assert folder.names("*") == (["a.tar"] if folder.size("a.tar") else folder.names("*"))
    with pytest.raises(FileNotFoundError, match=r"a\.tar"):
        folder.read("a.tar")


def test_a_source_in_a_store_lists_as_its_copy_on_a_disk(source, store):
    url = upload(source, "memory://pictures/train")
    here, there = ImageFolder(source).scan(), RemoteImageFolder(url).scan()
    assert (here.classes, here.keys, here.paths) == (there.classes, there.keys, there.paths)
    assert here.labels.tolist() == there.labels.tolist()
    samples = [there.sample(i) for i in (5, 0, 23, 5)]
    pictures = list(RemoteImageFolder(url).read(samples))
    assert pictures == [(source / sample.path).read_bytes() for sample in samples]
    stamp = RemoteImageFolder(url).stamp(samples[0])
    store.pipe_file(f"/pictures/train/{samples[0].path}", b"another picture")
    assert RemoteImageFolder(url).stamp(samples[0]) != stamp
    store.rm_file(f"/pictures/train/{samples[1].path}")
    with pytest.raises(FileNotFoundError, match=samples[1].path):
        list(RemoteImageFolder(url).read(samples))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stray.jpg", "beside the class folders"),
        ("ant/notes.txt", "no picture by its name"),
    ],
)
def test_bad_sources_in_a_store_are_refused(source, store, name, words):
    url = upload(source, "memory://pictures/train")
    store.pipe_file(f"/pictures/train/{name}", b"x")
    with pytest.raises(ValueError, match=rf"{name}.*{words}"):
        RemoteImageFolder(url).scan()
    store.rm_file(f"/pictures/train/{name}")
    with pytest.raises(ValueError, match="holds splits"):
        RemoteImageFolder("memory://pictures").scan()
    with pytest.raises(FileNotFoundError, match="holds nothing"):
        RemoteImageFolder("memory://elsewhere").scan()


def test_from_store_to_store_gives_the_bytes_of_a_disk(source, shards, store, tmp_path):
    url = upload(source, f"memory://{source.parent.name}/{source.name}")  # the manifest names the last two folders
    manifest = shard_source(url, "memory://out/in1k")
    expected = contents(shards)
    assert in_store(store, "memory://out/in1k").keys() == expected.keys()
    for name, data in in_store(store, "memory://out/in1k").items():
        if not name.startswith("."):  # records hold the sources' stamps, which differ
            assert data == expected[name], name
    assert manifest.num_samples == 24
    assert verify(VerifyOptions("memory://out/in1k/train.manifest.json", processes=1)) == []
    before = dict(store.modified(p) and (p, store.modified(p)) for p in store.find("/out") if p.endswith(".tar"))
    shard_source(url, "memory://out/in1k")
    assert {p: store.modified(p) for p in before} == before  # nothing was written again
    store.pipe_file("/out/in1k/train-000001.tar", store.cat_file("/out/in1k/train-000001.tar")[:-1])
    assert any("train-000001.tar" in fault for fault in verify(VerifyOptions("memory://out/in1k/train.manifest.json")))
    shard_source(url, "memory://out/in1k")
    assert in_store(store, "memory://out/in1k")["train-000001.tar"] == expected["train-000001.tar"]


def test_processes_and_tasks_write_into_one_store(source, shards, tmp_path):
    out = f"local://{tmp_path}/out"
    for task in (1, 0):
        shard_source(f"local://{source}", out, task=task, num_tasks=2, processes=2)
    finalize(FinalizeOptions(out))
    expected = contents(shards)
    found = contents(tmp_path / "out")
    assert {n: d for n, d in found.items() if n.endswith((".tar", ".idx"))} == {
        n: d for n, d in expected.items() if n.endswith((".tar", ".idx"))
    }


def test_an_upload_that_arrives_cut_is_an_error(store, monkeypatch):
    folder = open_folder("memory://out")
    put = type(store).put_file

    def cut(self, local, remote, **options):
        put(self, local, remote, **options)
        self.pipe_file(remote, self.cat_file(remote)[:-1])

    monkeypatch.setattr(type(store), "put_file", cut)
    with pytest.raises(OSError, match=r"out/a\.tar has 4 bytes of 5"), folder.file("a.tar") as file:
        file.write(b"12345")


def test_a_store_s_own_errors_name_the_place(store, monkeypatch):
    class Denied(Exception):
        pass

    def deny(*arguments, **options):
        raise Denied("no credentials")

    monkeypatch.setattr(type(store), "cat_file", deny)
    with pytest.raises(OSError, match=r"memory://out/a: Denied: no credentials"):
        open_folder("memory://out").read("a")


# ---- temporary files ----


def test_orphans_go_and_what_is_being_written_stays(tmp_path):
    killed = (
        "import os, sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; "
        "from data_prep.manifest import atomic_file; c = atomic_file(Path(sys.argv[1])); "
        "f = c.__enter__(); f.write(b'half'); f.flush(); os.kill(os.getpid(), 9)"
    )
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", killed, str(tmp_path / "train-000001.tar"), root])
    assert len(list(tmp_path.glob(".train-*.tmp"))) == 1
    with atomic_file(tmp_path / "train-000002.tar") as file:
        file.write(b"whole")
        assert remove_orphans(tmp_path, "val-*") == 0
        assert remove_orphans(tmp_path, "train-*") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["train-000002.tar"]


def test_a_full_disk_tells_what_is_needed_and_leaves_nothing(source, shards, tmp_path):
    """On a tmpfs of its own where the system lets us make one; it then goes on as soon as there is room."""
    small = tmp_path / "small"
    small.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "none", small], capture_output=True)
    if made.returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    try:
        with pytest.raises(OSError, match=r"No space left.*needs [\d,]+ bytes") as raised:
            shard_source(source, small, samples_per_shard=24)
        assert raised.value.errno == errno.ENOSPC and "train-000000.tar" in str(raised.value)
        assert not list(small.rglob("*.tar")) and not list(small.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=1m", small], check=True)
        shard_source(source, small, samples_per_shard=24)
        whole = tmp_path / "whole"
        shard_source(source, whole, samples_per_shard=24)
        assert contents(small) == contents(whole)
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_write_that_finds_the_disk_full_is_the_same_error(source, tmp_path, monkeypatch):
    real = os.write

    def full(descriptor, data):
        """Takes a part of the first block, then nothing."""
        if len(data) > 5000:
            return real(descriptor, data[:4999])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data_prep.background_write.os.write", full)
    with pytest.raises(OSError, match=r"No space left.*bytes free.*needs [\d,]+ bytes") as raised:
        shard_source(source, tmp_path / "out")
    needed = int(str(raised.value).split("needs ")[1].split(" ")[0].replace(",", ""))
    assert not list((tmp_path / "out").rglob("*.tar")) and not list((tmp_path / "out").rglob("*.tmp"))
    monkeypatch.setattr("data_prep.background_write.os.write", real)
    shard_source(source, tmp_path / "out")
    assert (tmp_path / "out" / "train-000000.tar").stat().st_size == needed
    shutil.rmtree(tmp_path / "out")
