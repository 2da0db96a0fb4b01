"""The native engine's threads: every sample once in any division of work, bad bytes told, nothing hangs or leaks."""

import gc
import os
import shutil
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import native
from pipeline.data.augment import AugmentConfig
from tests.unit.test_loader_native_pixels import jpeg, needs_library, pixels, view_of

SIZE, COUNT = 24, 40
VIEW = view_of(AugmentConfig(interpolation="bilinear"), SIZE, 2)
SOURCE = Path(native.__file__).parent / "csrc"


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A file of JPEGs and raw pictures, and native.ITEM (COUNT,) without descriptors."""
    path = tmp_path_factory.mktemp("samples") / "samples.bin"
    items, data = np.zeros(COUNT, native.ITEM), b"padding"
    for number, item in enumerate(items):
        width, height = 40 + number, 90 - number
        if number % 4 == 3:
            picture = pixels(width, height, number).tobytes()
            item["kind"], item["width"], item["height"] = native.RAW, width, height
        else:
            picture = jpeg(width, height, number, restart_marker_blocks=1 + number % 2)
        item["offset"], item["size"] = len(data), len(picture)
        item["crc32"], item["sample_id"] = zlib.crc32(picture), 100 + number
        data += picture
    path.write_bytes(data)
    return path, items


@pytest.fixture
def opened(samples):
    """native.ITEM (COUNT,) of an open file."""
    path, items = samples
    descriptor = os.open(path, os.O_RDONLY)
    yield with_descriptor(items, descriptor)
    os.close(descriptor)


def with_descriptor(items: np.ndarray, descriptor: int) -> np.ndarray:
    items = items.copy()
    items["fd"] = descriptor
    return items


def expected(samples: tuple[Path, np.ndarray]) -> np.ndarray:
    path, items = samples
    data, rows = path.read_bytes(), []
    for item in items:
        picture = data[item["offset"] : int(item["offset"]) + int(item["size"])]
        size = (int(item["width"]), int(item["height"])) if item["kind"] == native.RAW else None
        status, out, _ = native.make_picture(picture, VIEW, int(item["sample_id"]), size)
        assert status == native.OK
        rows.append(out)
    return np.stack(rows)


def batch(count: int) -> np.ndarray:
    return np.full((count, SIZE, SIZE, 3), 77, np.uint8)


@needs_library
@pytest.mark.parametrize("threads", [0, 1, 2, 7])
def test_every_sample_once_in_any_division_of_work(samples, opened, threads):
    whole, pool = expected(samples), native.Pool(threads)
    for split in (1, 3, 16, COUNT):
        jobs = []
        for first in range(0, COUNT, split):
            out = batch(len(opened[first : first + split]))
            jobs.append((first, out, pool.submit(opened[first : first + split], VIEW, out)))
        for first, out, job in reversed(jobs):
            assert (job.wait() == native.OK).all() and (job.wait() == native.OK).all()
            assert np.array_equal(out, whole[first : first + split])
            sizes = np.array([(40 + n, 90 - n) for n in range(first, first + len(out))])
            ids = opened["sample_id"][first : first + split]
            assert np.array_equal(job.crops, native.training_crops(sizes, ids, VIEW))
    pool.close()


@needs_library
def test_an_empty_batch():
    pool = native.Pool(1)
    assert pool.submit(np.zeros(0, native.ITEM), VIEW, batch(0)).wait().shape == (0,)


@needs_library
@pytest.mark.parametrize("threads", [0, 2])
def test_wrong_bytes_are_told_and_their_rows_are_zero(samples, opened, tmp_path, threads):
    path = Path(shutil.copy(samples[0], tmp_path / "bad.bin"))
    flipped = bytearray(path.read_bytes())
    at = int(opened[1]["offset"] + opened[1]["size"] // 2)
    flipped[at] ^= 4
    path.write_bytes(flipped)
    items = opened.copy()
    descriptor = os.open(path, os.O_RDONLY)
    items["fd"] = descriptor
    items[2]["fd"] = -1  # nothing to read from
    items[5]["offset"] = len(flipped) - 10  # cut off
    items[6]["offset"] = 2**40
    items[4]["width"], items[4]["height"] = 7, 7  # not what the JPEG says
    items[7]["height"] += 1  # not what the bytes say
    items[8]["crc32"] ^= 1
    out = batch(COUNT)
    status = native.Pool(threads).submit(items, VIEW, out).wait()
    os.close(descriptor)
    bad = {
        1: native.WRONG_BYTES,
        2: native.READ_FAILED,
        4: native.ASK_REFERENCE,
        5: native.WRONG_BYTES,
        6: native.WRONG_BYTES,
        7: native.ASK_REFERENCE,
        8: native.WRONG_BYTES,
    }
    assert {i: status[i] for i in np.flatnonzero(status)} == bad
    rows = np.array(list(bad))
    assert not out[rows].any()
    assert np.array_equal(np.delete(out, rows, 0), np.delete(expected(samples), rows, 0))


@needs_library
def test_checksums_are_looked_at_unless_a_benchmark_says_otherwise(opened):
    items, pool, out = opened.copy(), native.Pool(0), batch(COUNT)
    items["crc32"] ^= 1
    assert VIEW.verify and (pool.submit(items, VIEW, out).wait() == native.WRONG_BYTES).all()
    assert (pool.submit(items, replace(VIEW, verify=False), out).wait() == native.OK).all()


@needs_library
def test_every_flipped_bit_is_found(samples, tmp_path):
    """500 flips over JPEGs and raw pictures: none is accepted."""
    path = Path(shutil.copy(samples[0], tmp_path / "flipped.bin"))
    data, draw = path.read_bytes(), np.random.RandomState(0)
    pool, out = native.Pool(0), batch(1)
    with path.open("r+b") as file:
        items = with_descriptor(samples[1], file.fileno())
        for flip in range(500):
            item = items[flip % COUNT : flip % COUNT + 1]
            at = int(item["offset"][0]) + draw.randint(item["size"][0])
            os.pwrite(file.fileno(), bytes([data[at] ^ 1 << flip % 8]), at)
            assert pool.submit(item, VIEW, out).wait()[0] == native.WRONG_BYTES
            os.pwrite(file.fileno(), data[at : at + 1], at)
        assert (pool.submit(items, VIEW, batch(COUNT)).wait() == native.OK).all()


@needs_library
def test_arrays_of_other_shapes_are_refused(opened):
    pool, readonly = native.Pool(0), batch(COUNT)
    readonly.flags.writeable = False
    for out, words in (
        (batch(COUNT + 1), "must be uint8"),
        (np.zeros((COUNT, SIZE, SIZE, 3), np.int8), "must be uint8"),
        (batch(2 * COUNT)[::2], "packed"),
        (readonly, "written to"),
    ):
        with pytest.raises(ValueError, match=words):
            pool.submit(opened, VIEW, out)
    with pytest.raises(ValueError, match=r"native\.ITEM"):
        pool.submit(opened["offset"], VIEW, batch(COUNT))
    every_other = pool.submit(opened[::2], VIEW, batch(COUNT // 2))  # items need not be packed
    assert (every_other.wait() == native.OK).all()


@needs_library
def test_other_python_threads_run_while_one_waits(opened):
    """wait() gives the interpreter's lock back: a job whose thread is busy lets another thread count meanwhile."""
    pool, counted, done = native.Pool(1), 0, threading.Event()
    jobs = [pool.submit(opened, VIEW, batch(COUNT)) for _ in range(20)]
    waiter = threading.Thread(target=lambda: (jobs[-1].wait(), done.set()))
    waiter.start()
    while not done.is_set():
        counted += 1
    waiter.join()
    assert counted > 0
    assert all((job.wait() == native.OK).all() for job in jobs)


@needs_library
@pytest.mark.parametrize("threads", [0, 2])
def test_several_python_threads_share_a_pool(samples, opened, threads):
    whole, pool, found = expected(samples), native.Pool(threads), []

    def read() -> None:
        for _ in range(5):
            out = batch(COUNT)
            found.append((pool.submit(opened, VIEW, out).wait() == native.OK).all() and np.array_equal(out, whole))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == [True] * 15


@needs_library
def test_closing_ends_the_threads_and_every_wait(opened):
    before = threads_of_this_process()
    pool = native.Pool(3)
    assert threads_of_this_process() > before  # others than the pool's may end in between
    jobs = [(out, pool.submit(opened, VIEW, out)) for out in (batch(COUNT) for _ in range(30))]
    pool.close()
    pool.close()
    assert threads_of_this_process() <= before
    for out, job in jobs:
        status = job.wait()
        assert set(status.tolist()) <= {native.OK, native.ASK_REFERENCE}
        assert not out[status != native.OK].any()
    assert (jobs[-1][1].wait() == native.ASK_REFERENCE).all()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(opened, VIEW, batch(COUNT))


def threads_of_this_process() -> int:
    gc.collect()  # pools of earlier tests end with the last reference
    return len(os.listdir("/proc/self/task"))


@needs_library
def test_what_python_drops_is_waited_for(opened):
    before = threads_of_this_process()
    for _ in range(20):
        pool = native.Pool(2)
        pool.submit(opened, VIEW, batch(COUNT))  # the job and its arrays are dropped at once
        job = pool.submit(opened, VIEW, batch(COUNT))
        del pool  # the job still needs it
        assert (job.wait() == native.OK).all()
        del job
    assert threads_of_this_process() <= before


@needs_library
def test_memory_does_not_grow(opened):
    pool, out = native.Pool(2), batch(COUNT)

    def resident_after(batches: int) -> int:
        for _ in range(batches):
            assert (pool.submit(opened, VIEW, out).wait() == native.OK).all()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    settled = resident_after(30)
    assert resident_after(200) - settled < 1_000_000


def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *words],
        env=os.environ | {"PYTHONPATH": str(SOURCE.parents[2])} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


_UNFINISHED = """
import os, sys, numpy as np
from pipeline.data import native
items = np.load(sys.argv[1])
items["fd"] = os.open(sys.argv[2], os.O_RDONLY)
view = native.View(24, 5, 2, (0.08, 1.0), (0.75, 4 / 3), 0.5, "bilinear", "center", 0.9)
pool = native.Pool(2)
make = lambda: pool.submit(items, view, np.zeros((len(items), 24, 24, 3), np.uint8))
jobs = [make() for _ in range(50)]
if sys.argv[3] == "fork":
    child = os.fork()
    if child == 0:  # the parent's threads are not here: nothing may wait for them
        try:
            jobs[0].wait()
        except RuntimeError as error:
            assert "before a fork" in str(error)
        del jobs[:]
        pool.close()
        pool = native.Pool(1)
        assert (make().wait() == native.OK).all()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert all((job.wait() == native.OK).all() for job in jobs)
print("end")
"""


@needs_library
@pytest.mark.parametrize("how", ["exit", "fork"])
def test_a_process_ends_with_work_under_way(samples, tmp_path, how):
    path, items = samples
    np.save(tmp_path / "items.npy", items)
    done = run(_UNFINISHED, str(tmp_path / "items.npy"), str(path), how)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


_HASH = """
import hashlib, io, numpy as np
from pipeline.data import native
digest = hashlib.sha256()
for width, height in ((97, 61), (40, 300), (700, 40), (61, 97)):
    picture = np.random.RandomState(width).randint(0, 256, (height, width, 3), np.uint8)
    for interpolation in ("bilinear", "bicubic"):
        for size in (5, 33, 64):
            for epoch in (None, 0, 1):
                view = native.View(size, 1, epoch, (0.08, 1.0), (0.75, 4 / 3), 0.5, interpolation, "center", 0.9)
                status, out, crop = native.make_picture(picture.tobytes(), view, 3, (width, height))
                assert status == native.OK
                digest.update(out.tobytes() + crop.tobytes())
print(native.library().nn_loader_lanes().decode(), digest.hexdigest())
"""


@needs_library
def test_every_instruction_set_gives_the_same_bits():
    found, sets = {}, ("AVX-512", "AVX2", "one lane")
    with ThreadPoolExecutor() as pool:  # each takes seconds to start
        results = dict(zip(sets, pool.map(lambda lanes: run(_HASH, NOISYNN_LANES=lanes), sets), strict=True))
    for lanes, done in results.items():
        if "NOISYNN_LANES is" in done.stderr:
            continue  # this processor has it not
        assert done.stdout.startswith(lanes), done.stderr
        found[lanes] = done.stdout.split()[-1]
    assert "one lane" in found and len(set(found.values())) == 1


@needs_library
def test_checksums_are_zlibs():
    for data in (b"", b"a", bytes(range(256)) * 99):
        assert native.crc32(data) == zlib.crc32(data)


def test_a_library_that_is_missing_or_old_is_said_once(tmp_path, monkeypatch, capsys):
    try:
        for content in (None, b"no library"):
            path = tmp_path / "libnoisynn_loader.so"
            if content is not None:
                path.write_bytes(content)
            monkeypatch.setattr(native, "LIBRARY", path)
            native.library.cache_clear()
            assert native.library() is None and native.library() is None
            assert capsys.readouterr().err.count("make setup") == 1
            with pytest.raises(RuntimeError, match="make setup"):
                native.Pool(1)
        monkeypatch.undo()
        monkeypatch.setattr(native, "ABI", 99)
        native.library.cache_clear()
        assert native.library() is None
    finally:
        monkeypatch.undo()
        native.library.cache_clear()


def test_missing_headers_are_told_in_one_line(tmp_path):
    """And are no error: the loader works without, by Pillow."""
    folder = Path(shutil.copytree(SOURCE, tmp_path / "csrc", ignore=shutil.ignore_patterns("*.o", "*.so")))
    done = subprocess.run(
        ["make", "--silent", "-C", folder, "CXX=false"],
        capture_output=True,
        text=True,
        env=os.environ | {"MAKEFLAGS": ""},
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "libjpeg-dev libdeflate-dev" in done.stderr and done.stderr.count("\n") == 1
    assert not list(folder.glob("*.so"))
