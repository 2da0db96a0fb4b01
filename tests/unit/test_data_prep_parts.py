"""data_prep's parts one by one: manifest and index, ImageFolder, plan, digits, workers."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from data_prep import manifest, plan, sources, workers
from data_prep.digits import VAL_PER_CLASS, DigitsOptions, choose_splits, write_digits
from data_prep.sources.image_folder import ImageFolder

# ---- manifest and index ----


@pytest.fixture
def whole(tmp_path) -> manifest.Manifest:
    return manifest.Manifest(
        split="train",
        classes=("a", "ü"),
        class_counts=(3, 2),
        shards=(manifest.ShardRecord("train-000000.tar", 5, 10240, "ab", "cd"),),
        source={"kind": "image-folder"},
        options={"seed": 0},
        repaired=(manifest.Note("a_1", "a/1.png", "PNG, mode P"),),
        skipped=(manifest.Note("a_2", "a/2.jpg", "the file is empty"),),
        beton=manifest.BetonRecord("train.beton", 5, 99, "ef", "01", "jpg", None, None),
        class_names=("tench, Tinca tinca", "goldfish"),
        folder=tmp_path,
    )


def test_manifest_round_trip(whole):
    path = manifest.write_manifest(whole)
    again = manifest.read_manifest(path)
    assert again == whole
    assert again.folder == whole.folder
    assert again.num_samples == 5
    assert again.shards[0].index_name == "train-000000.idx"
    for change in ({"beton": None}, {"shards": ()}, {"class_names": ()}):
        other = dataclasses.replace(whole, **change)
        assert manifest.read_manifest(manifest.write_manifest(other)) == other


def _drop(name):
    return lambda body: body.pop(name)


def _put(name, value):
    return lambda body: body.__setitem__(name, value)


@pytest.mark.parametrize(
    "damage",
    [
        _put("format", "other"),
        _put("version", 99),
        _put("num_samples", 6),
        _put("class_counts", [3, 3]),
        _put("class_counts", ["3", "2"]),
        _put("class_counts", [6, -1]),
        _put("class_counts", [5]),
        _put("classes", [1, 2]),
        _put("shards", None),
        _put("shards", [5]),
        _put("beton", 5),
        _put("class_names", ["one"]),
        _put("class_names", [1, 2]),
        lambda body: body.update(shards=[], beton=None),
        lambda body: body["beton"].update(samples=4) or body.update(shards=[]),
        _put("source", []),
        _put("unknown", 1),
        _drop("shards"),
        _drop("classes"),
        lambda body: body["shards"][0].update(name="../x.tar"),
        lambda body: body["shards"][0].update(name="/x.tar"),
        lambda body: body["shards"][0].update(name=7),
        lambda body: body["shards"][0].update(samples="5"),
        lambda body: body["shards"][0].update(extra=1),
        lambda body: body["beton"].update(name="../x.beton"),
    ],
)
def test_damaged_manifest_is_refused_by_name(whole, damage):
    path = manifest.write_manifest(whole)
    body = json.loads(path.read_text())
    damage(body)
    path.write_text(json.dumps(body))
    with pytest.raises(ValueError, match=path.name):
        manifest.read_manifest(path)


def test_manifest_cut_anywhere_is_refused(whole):
    path = manifest.write_manifest(whole)
    text = path.read_bytes()
    for length in range(0, len(text) - 1, 7):
        path.write_bytes(text[:length])
        with pytest.raises(ValueError, match=path.name):
            manifest.read_manifest(path)


def test_index_round_trip_and_every_damage(tmp_path):
    entries = [manifest.IndexEntry(512, 700, 3, 0xDEADBEEF), manifest.IndexEntry(1 << 40, 2**32 - 1, -1, 0)]
    data = manifest.pack_index(entries)
    assert manifest.unpack_index(data, tmp_path) == entries
    assert manifest.check_index(data, tmp_path) == (2, True)
    assert manifest.check_index(manifest.pack_index(entries, crc_known=False), tmp_path) == (2, False)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(ValueError, match="shard"):
            manifest.check_index(bytes(flipped), tmp_path)
        with pytest.raises(ValueError, match="shard"):
            manifest.check_index(data[:position], tmp_path)


def test_atomic_file_leaves_all_or_nothing(tmp_path):
    path = tmp_path / "x"
    with manifest.atomic_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(RuntimeError), manifest.atomic_file(path) as file:
        file.write(b"two")
        raise RuntimeError
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_manifest_needs_the_standard_library_only_and_data_prep_no_torch():
    code = (
        "import sys; import data_prep.manifest; assert not {'numpy', 'PIL', 'tyro'} & set(sys.modules); "
        "import data_prep.__main__; assert not {'torch', 'ffcv', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(os.path.dirname(manifest.__file__)))


# ---- sources and plan ----


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_image_folder_lists_as_torchvision_does(tmp_path):
    names = ["b/2.JPEG", "b/10.png", "b/sub/1.jpg", "b/Z.webp", "a/x.bmp", "a/sub.d/x.jpeg", "C/1.jpg"]
    for name in [*names, "a/.DS_Store", ".git/config"]:
        touch(tmp_path / name)
    listing = ImageFolder(tmp_path).scan()
    from torchvision.datasets.folder import find_classes, make_dataset

    classes, _ = find_classes(str(tmp_path))
    classes.remove(".git")  # torchvision takes hidden folders for classes
    theirs = make_dataset(
        str(tmp_path), {name: classes.index(name) for name in classes}, (*sources.PICTURE_SUFFIXES, ".x")
    )
    assert list(listing.classes) == classes == ["C", "a", "b"]
    paths = [str(tmp_path / path) for path in listing.paths]
    assert list(zip(paths, listing.labels.tolist(), strict=True)) == theirs
    assert len(listing) == len(names)


def test_keys_trace_back_and_are_unique(tmp_path):
    names = [
        "n01/n01_7.JPEG",
        "n01/n01_8.JPEG",
        "n02/a.b.jpg",
        "n02/a_b.jpg",
        "n02/a_b.png",
        "n02/é.jpg",
        "n02/sub/q.jpg",
    ]
    names += [f"n02/{'long' * 40}{i}.jpg" for i in range(3)]
    for name in names:
        touch(tmp_path / name)
    listing = ImageFolder(tmp_path).scan()
    keys = dict(zip(listing.paths, listing.keys, strict=True))
    assert keys["n01/n01_7.JPEG"] == "n01_7"
    assert keys["n02/sub/q.jpg"] == "n02_sub_q"
    assert len(set(keys.values())) == len(names)
    assert all(key.isascii() and not set(key) & set("./") and len(key) <= 96 for key in keys.values())


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path / "store" / "1.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to(tmp_path / "store")
    assert ImageFolder(tmp_path / "set").scan().paths == ["a/1.jpg"]
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "store")
    with pytest.raises(ValueError, match=r"loop.*remove it"):
        ImageFolder(tmp_path / "set").scan()


def test_listing_digest_sees_names_labels_and_order():
    def digest(*pairs: tuple[str, int]) -> str:
        builder = sources.ListingBuilder(("a", "b"))
        for path, label in pairs:
            builder.add(path, label)
        return builder.listing().sha256()

    one, two = ("a/1.jpg", 0), ("a/2.jpg", 0)
    variants = [(one, two), (two, one), (one,), (("a/1.jpg", 1), two)]
    assert len({digest(*pairs) for pairs in variants}) == 4
    many = [(f"a/{i}.jpg", i % 2) for i in range(10_000)]
    assert digest(*many) == hashlib.sha256("".join(f"{p}\0{label}\n" for p, label in many).encode()).hexdigest()


def test_plan_is_a_stable_shuffled_partition():
    def plan_of(*arguments, **options) -> list[list[int]]:
        return [shard.tolist() for shard in plan.plan_shards(*arguments, **options)]

    shards = plan_of(1000, 64, seed=3)
    assert [len(s) for s in shards] == [64] * 15 + [40]
    flat = [i for s in shards for i in s]
    assert sorted(flat) == list(range(1000))
    assert flat != list(range(1000))
    assert plan_of(1000, 100, seed=3)[0][:64] == shards[0]  # the order does not depend on the shard's size
    assert plan_of(1000, 64, seed=4) != shards
    assert plan_of(5, 2, seed=3, keep_order=True) == [[0, 1], [2, 3], [4]]
    # Golden: a sample id is for ever. If this fails, LAYOUT_VERSION of parts.py must change.
    assert plan_of(10, 10, seed=0)[0] == [3, 7, 5, 2, 8, 4, 9, 1, 6, 0]


@pytest.mark.parametrize("runs", [[10] * 40, [7, 1, 30, 22, 100, 240], [400]])
def test_a_shard_meets_as_few_runs_as_it_can(runs):
    run_of = np.repeat(np.arange(len(runs)), runs)
    shards = plan.plan_shards(400, 50, seed=1, runs=runs)
    assert sorted(np.concatenate(shards).tolist()) == list(range(400))
    # Cutting a line of runs into 8 pieces divides 7 runs at most.
    assert sum(len(set(run_of[shard])) for shard in shards) <= len(runs) + len(shards) - 1
    assert any(np.diff(shard).min() < 0 for shard in shards)  # shuffled inside, too
    kept = plan.plan_shards(400, 50, seed=1, keep_order=True, runs=runs)
    assert np.concatenate(kept).tolist() == list(range(400))


def test_imagenet_s_plan_and_manifest_stay_under_600_megabytes():
    code = """
from data_prep.manifest import Manifest, Note, ShardRecord, parse_manifest
from data_prep.plan import plan_shards, shard_name
from data_prep.sources import ListingBuilder
from pathlib import Path

builder = ListingBuilder([f"n{label:08d}" for label in range(1000)])
for i in range(1_281_167):
    label = i * 1000 // 1_281_167
    builder.add(f"n{label:08d}/n{label:08d}_{i}.JPEG", label)
listing = builder.listing()
del builder
plan = plan_shards(len(listing), 1000, 0)
records = tuple(ShardRecord(shard_name("train", i), len(ids), 1, "0" * 64, "0" * 64) for i, ids in enumerate(plan))
notes = tuple(Note(listing.keys[i], listing.paths[i], "grey") for i in range(20_000))
source = {"listing_sha256": listing.sha256()}
counts = [0] * 1000
for label in listing.labels:
    counts[label] += 1
manifest = Manifest("train", listing.classes, tuple(counts), records, source, {}, repaired=notes)
assert parse_manifest(manifest.to_json().encode(), "m", Path()) == manifest
# A process inherits ru_maxrss of the one that started it; this peak is its own.
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(peak.split()[1]) // 1024)
"""
    root = os.path.dirname(os.path.dirname(manifest.__file__))
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True, text=True)
    assert int(done.stdout) < 600


# ---- digits ----


def test_val_is_spread_evenly_through_each_class():
    labels = np.random.RandomState(0).randint(0, 3, 500)
    chosen = np.array(choose_splits(labels)) == "val"
    for label in range(3):
        (places,) = np.nonzero(chosen[labels == label])
        count = (labels == label).sum()
        assert len(places) == VAL_PER_CLASS
        assert np.diff(places).min() >= count // VAL_PER_CLASS and np.diff(places).max() <= count // VAL_PER_CLASS + 1
        assert places[0] < 5 and places[-1] >= count - 5


def test_digits_do_not_overwrite_anything_else(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"mine.*remove it"):
        write_digits(DigitsOptions(tmp_path / "mine"))
    assert [p.name for p in tmp_path.rglob("*.jpg")] == ["1.jpg"]


# ---- workers ----


def square(number):
    return number * number


def die_at_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail_at_three(number):
    if number == 3:
        raise ValueError("three is bad")
    return number


def test_map_ordered_keeps_order_and_passes_errors_on():
    assert list(workers.map_ordered(square, range(20), 2)) == [n * n for n in range(20)]
    with pytest.raises(ValueError, match="three is bad"):
        list(workers.map_ordered(fail_at_three, range(20), 2))


def test_a_dead_worker_is_one_error_and_no_hang():
    with pytest.raises(ChildProcessError, match="died"):
        list(workers.map_ordered(die_at_three, range(20), 2))
