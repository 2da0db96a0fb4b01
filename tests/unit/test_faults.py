"""Faults, by count: killed writers, flipped bits, cuts, swaps. Each is found, or ends as an undisturbed run does."""

import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from source_pictures import check, contents, shard_source

REPOSITORY = Path(__file__).resolve().parents[2]

# Forks its own writers, so that a kill falls into the writing and not into half a second of imports.
KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from data_prep.distribute import ShardOptions, shard

source, root, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

def write(out):
    shard(ShardOptions(source, out, samples_per_shard=3, processes=1))

start = time.monotonic()
write(root / "good")
seconds = time.monotonic() - start
expected, draw, middle, redone = contents(root / "good"), random.Random(0), 0, 0
for number in range(kills):
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    child = os.fork()
    if child == 0:
        write(out)
        os._exit(0)
    time.sleep(draw.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    records = {p.name.removesuffix(".json") for p in out.glob(".train.parts/train-*.json")}
    middle += bool(done) and not (out / "train.manifest.json").exists()
    write(out)
    assert contents(out) == expected, f"kill {number}"
    again = [name for name, before in done.items() if (out / name).stat().st_mtime_ns != before]
    assert not records & set(again) and len(again) <= 1, f"kill {number}: {again} were done again"
    redone += len(again)
print(kills, middle, redone)
"""


def test_fifty_killed_writers_end_as_an_undisturbed_one(source, tmp_path):
    command = [sys.executable, "-c", KILLER, str(source), str(tmp_path), "50"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kills, in_the_middle, _ = map(int, done.stdout.split())
    assert kills == 50 and in_the_middle >= 20, "most kills fell before or after the writing: little was tried"


def test_three_hundred_flipped_bits_are_found(copy):
    draw = random.Random(0)
    files = sorted([*copy.glob("*.tar"), *copy.glob("*.idx")])
    for number in range(300):
        path = draw.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        place = draw.randrange(len(bad))
        bad[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        faults = check(copy, quick=number % 10 > 0)
        assert faults and any(path.stem in fault for fault in faults), f"flip {number} of {path.name} at {place}"
        path.write_bytes(good)
    assert check(copy) == []


def test_a_cut_at_any_place_is_found(copy):
    """At each boundary of members and blocks, and at 100 bytes between; of tars and indexes."""
    draw = random.Random(0)
    tar, index = copy / "train-000002.tar", copy / "train-000002.idx"
    with tarfile.open(tar) as file:
        places = {member.offset for member in file} | {member.offset_data for member in file.getmembers()}
    good = tar.read_bytes()
    places |= set(range(0, len(good), 512)) | {draw.randrange(len(good)) for _ in range(100)}
    for place in sorted(places):
        tar.write_bytes(good[:place])
        assert any("train-000002.tar" in fault for fault in check(copy, quick=True)), place
    tar.write_bytes(good)
    good = index.read_bytes()
    for place in range(len(good)):
        index.write_bytes(good[:place])
        assert any("train-000002.idx" in fault for fault in check(copy, quick=True)), place
    index.write_bytes(good)
    assert check(copy) == []


def test_shards_missing_extra_or_swapped_are_found(copy, source):
    names = [f"train-{i:06d}" for i in range(4)]
    for suffix in (".tar", ".idx"):
        for one in names:
            path = copy / (one + suffix)
            path.rename(copy / "away")
            assert f"{path.name}: missing" in check(copy, quick=True)
            (copy / "away").rename(path)
        for one, two in ((0, 1), (1, 3), (2, 0)):
            a, b = copy / (names[one] + suffix), copy / (names[two] + suffix)
            saved = a.read_bytes(), b.read_bytes()
            a.write_bytes(saved[1]), b.write_bytes(saved[0])
            faults = " ".join(check(copy, quick=True))
            assert a.name in faults and b.name in faults
            a.write_bytes(saved[0]), b.write_bytes(saved[1])
    for name in ("train-000004.tar", "train-000777.tar"):
        shutil.copy(copy / "train-000000.tar", copy / name)
        assert check(copy, quick=True) == [f"{name}: not in the manifest"]
        with pytest.raises(ValueError, match="none of this split's 4 shards"):
            shard_source(source, copy)
        (copy / name).unlink()


def test_every_flip_in_a_manifest_is_found_or_harmless(copy):
    """A manifest has no hash of its own: its fields are checked, and what they promise is compared with the files."""
    path = copy / "train.manifest.json"
    good = path.read_bytes()
    before = contents(copy)
    draw = random.Random(0)
    for _ in range(60):
        bad = bytearray(good)
        place = draw.randrange(good.index(b'"source"'))  # classes, counts, shards
        bad[place] ^= 1 << draw.randrange(7)
        path.write_bytes(bad)
        try:
            faults = check(copy)
        except ValueError as error:
            assert path.name in str(error)
            continue
        changed = {name for name, data in contents(copy).items() if data != before[name]}
        assert changed == {path.name}
        assert faults or _same_but_for_names(good, bytes(bad)), (place, good[place - 20 : place + 20])
    path.write_bytes(good)


def _same_but_for_names(good: bytes, bad: bytes) -> bool:
    """Whether only a class's name or blank space differs, of which the files know nothing."""
    import json

    one, two = json.loads(good), json.loads(bad)
    return {k for k in one if one[k] != two.get(k)} <= {"classes"}
