"""The mapped index: found by sample id, checked, and one copy for all ranks of a machine."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.manifest import IndexEntry, pack_index
from pipeline.data.index import IndexFile, SampleIndex

REPOSITORY = Path(__file__).resolve().parents[2]


def entries(count: int, first: int) -> list[IndexEntry]:
    return [IndexEntry(512 * i, 100 + i, (first + i) % 1000, first + i) for i in range(count)]


def written(folder: Path, sizes: list[int], crc_known: bool = True) -> list[IndexFile]:
    files, first = [], 0
    for number, count in enumerate(sizes):
        path = folder / f"{number}.idx"
        path.write_bytes(pack_index(entries(count, first), crc_known))
        files.append(IndexFile(path, count, hashlib.sha256(path.read_bytes()).hexdigest(), "write it again"))
        first += count
    return files


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.data())
def test_records_are_those_of_the_sample_ids(tmp_path_factory, sizes, data):
    """In any order, repeated, from files that may be empty; the CRC is the sample id here."""
    index = SampleIndex(written(tmp_path_factory.mktemp("index"), sizes))
    n = sum(sizes)
    assert len(index) == n
    assert index.labels().tolist() == [i % 1000 for i in range(n)]
    ids = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=12)) if n else [], np.int64)
    assert index.records(ids)["crc32"].tolist() == ids.tolist()
    for i in ids.tolist():
        file, place = index.place(i)
        assert sum(sizes[:file]) + place == i and place < sizes[file]


@pytest.mark.parametrize("ids", [[-1], [5], [0, 9]])
def test_there_are_no_other_samples(tmp_path, ids):
    with pytest.raises(IndexError, match="there are 5 samples"):
        SampleIndex(written(tmp_path, [2, 3])).records(np.array(ids))


def test_records_cannot_be_changed_by_a_reader(tmp_path):
    index = SampleIndex(written(tmp_path, [2, 3]))
    index.records(np.array([0]))["label"] = 7
    assert index.labels().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="read-only"):
        index._records[0]["label"] = 7


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    good = written(tmp_path, [3])[0]
    data = good.path.read_bytes()
    with pytest.raises(ValueError, match=r"0\.idx has 3 samples, the manifest says 4: write it again"):
        SampleIndex([good._replace(samples=4)])
    for bad in (b"", data[:-1], data + b"\0", data[:30] + b"\1" + data[31:]):
        good.path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"0\.idx is not the index that the manifest tells of: write it again"):
            SampleIndex([good])
    good.path.write_bytes(b"")  # with its true hash
    with pytest.raises(ValueError, match=r"0\.idx is not a shard index"):
        SampleIndex([good._replace(sha256=hashlib.sha256(b"").hexdigest())])
    good.path.unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.idx is missing: write it again"):
        SampleIndex([good])
    with pytest.raises(ValueError, match=r"0\.idx holds no CRCs.*index --hash"):
        SampleIndex(written(tmp_path, [3], crc_known=False))


RANK = """
import ctypes, os, re, sys
from pathlib import Path
import numpy as np
from pipeline.data.index import IndexFile, SampleIndex

def private_bytes():  # anonymous pages: those of a file are shared by all who map it
    ctypes.CDLL(None).malloc_trim(0)  # what was freed may stay with the process for a while, as the heap lies
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"Anonymous: +(\\d+)", text)[1])

files = [IndexFile(Path(path), int(count), sha, "") for path, count, sha in (a.split("|") for a in sys.argv[1:])]
SampleIndex(files[:1]).labels()
before, descriptors = private_bytes(), len(os.listdir("/proc/self/fd"))
index = SampleIndex(files)
index.records(np.random.RandomState(0).randint(0, len(index), 10_000))
assert index.labels().sum() > 0
print(private_bytes() - before, len(os.listdir("/proc/self/fd")) - descriptors)
"""


def test_ranks_of_a_machine_hold_one_copy(tmp_path):
    """640,000 samples in 320 files, 12.8 MB: a rank of its own has but some 5 KB a file, and no descriptor."""
    files = written(tmp_path, [2000] * 320)
    held = sum(file.path.stat().st_size for file in files)
    assert held > 12_800_000
    words = [f"{file.path}|{file.samples}|{file.sha256}" for file in files]
    done = subprocess.run(
        [sys.executable, "-c", RANK, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    private, descriptors = map(int, done.stdout.split())
    assert private < 2_000_000, f"{private} bytes of its own for an index of {held}"
    assert descriptors == 0
