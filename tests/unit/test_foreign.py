"""Tars of other makers get an index and a manifest, and are read through them; hostile ones are refused."""

import dataclasses
import hashlib
import io
import json
import pickle
import shutil
import tarfile
import zlib
from pathlib import Path

import pytest
from source_pictures import CLASSES, check, picture
from twins import tar_of

from data_prep.foreign import IndexOptions, hashes_of, index, samples_in
from data_prep.manifest import BetonRecord, read_manifest, unpack_index, write_manifest
from data_prep.tar_shards import read_index, read_pictures


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


PICTURES = [jpeg(seed) for seed in range(12)]


def timm_s(numbers: range, front: str = "") -> bytes:
    """jpg, cls and json, as timm's ImageNet has them."""
    members = []
    for i in numbers:
        about = json.dumps({"label": i % 3, "name": CLASSES[i % 3], "width": 40, "height": 32}).encode()
        key = f"{front}n{i:05d}"
        members += [(f"{key}.cls", b"%d" % (i % 3)), (f"{key}.jpg", PICTURES[i]), (f"{key}.json", about)]
    return tar_of(members)


def write(folder: Path, **tars: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in tars.items():
        (folder / f"{name}.tar").write_bytes(data)
    return folder


@pytest.fixture
def timm_tars(tmp_path) -> Path:
    return write(tmp_path / "tars", a=timm_s(range(7)), b=timm_s(range(7, 12)))


def run(*tars: Path, **options):
    return index(IndexOptions(tuple(map(str, tars)), **({"processes": 1} | options)))


def pictures_of(folder: Path, split: str = "train") -> list[tuple[bytes, int]]:
    manifest = read_manifest(folder / f"{split}.manifest.json")
    found = []
    for shard in manifest.shards:
        entries = read_index(folder, shard)
        found += zip(read_pictures(folder / shard.name, entries), (entry.label for entry in entries), strict=True)
    return found


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("label", ["cls", "json:label", "json:name"])
def test_every_picture_is_found_with_its_label(timm_tars, label):
    before = {path.name: path.read_bytes() for path in timm_tars.iterdir()}
    manifest = run(timm_tars, label=label, hash=True)
    assert manifest.classes == (CLASSES if label == "json:name" else ("0", "1", "2"))
    assert (manifest.class_counts, manifest.num_samples) == ((4, 4, 4), 12)
    assert pictures_of(timm_tars) == [(data, i % 3) for i, data in enumerate(PICTURES)]
    assert check(timm_tars) == check(timm_tars, quick=True) == []
    assert {name: (timm_tars / name).read_bytes() for name in before} == before
    for record in manifest.shards:
        assert record.sha256 == hashlib.sha256(before[record.name]).hexdigest()


def test_the_result_is_the_same_on_any_number_of_processes_and_again(timm_tars):
    run(timm_tars, hash=True)
    expected = {path.name: path.read_bytes() for path in timm_tars.iterdir()}
    run(timm_tars / "a.tar", timm_tars / "b.tar", hash=True, processes=2)
    assert {path.name: path.read_bytes() for path in timm_tars.iterdir()} == expected


def test_without_hashes_nothing_counts_as_verified(timm_tars):
    manifest = run(timm_tars)
    assert [record.sha256 for record in manifest.shards] == [None, None]
    faults = check(timm_tars, quick=True)
    assert len(faults) == 2 and all("unverified" in fault and "index --hash" in fault for fault in faults)
    entries = read_index(timm_tars, manifest.shards[0])
    assert {entry.crc32 for entry in entries} == {0}
    run(timm_tars, hash=True)
    assert check(timm_tars) == []


def test_damage_after_indexing_is_found(timm_tars):
    run(timm_tars, hash=True)
    path = timm_tars / "b.tar"
    bad = bytearray(path.read_bytes())
    entry = read_index(timm_tars, read_manifest(timm_tars / "train.manifest.json").shards[1])[2]
    bad[entry.offset + 50] ^= 1
    path.write_bytes(bad)
    assert any("n00009: its CRC" in fault for fault in check(timm_tars))
    assert check(timm_tars, quick=True) == ["b.tar: its sha256 is not the manifest's"]


def test_own_tars_get_their_own_index_again(shards, tmp_path):
    names = [path.name for path in sorted(shards.glob("*.tar"))]
    for name in names:
        shutil.copy(shards / name, tmp_path / name)
    run(tmp_path, hash=True)
    for name in names:
        own = Path(name).with_suffix(".idx")
        assert (tmp_path / own).read_bytes() == (shards / own).read_bytes()
    assert check(tmp_path) == []


def test_img2dataset_s_layout_and_leading_dots(tmp_path):
    members = []
    for i in range(3):
        about = json.dumps({"caption": "x", "class": i}).encode()
        members += [(f"./{i:09d}.jpg", PICTURES[i]), (f"./{i:09d}.txt", b"x"), (f"./{i:09d}.json", about)]
    folder = write(tmp_path / "tars", x=tar_of(members))
    with pytest.raises(ValueError, match=r"x\.tar: sample '000000000' has no \.cls: .*--label"):
        run(folder)
    assert run(folder, label="json:class", hash=True).class_counts == (1, 1, 1)
    assert [data for data, _ in pictures_of(folder)] == PICTURES[:3]


def test_class_names_come_from_a_file(timm_tars, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("ant\nbee\ncat\ndog\n")
    manifest = run(timm_tars, classes=names)
    assert manifest.classes == ("ant", "bee", "cat", "dog") and manifest.class_counts == (4, 4, 4, 0)
    names.write_text("ant\nbee\n")
    with pytest.raises(ValueError, match="2 classes, but there is a label 2"):
        run(timm_tars, classes=names)
    with pytest.raises(ValueError, match=r"'cat' of a sample is not in --classes"):
        run(timm_tars, classes=names, label="json:name")


def sample(key: str = "k", **members: bytes) -> list[tuple[str, bytes]]:
    return [(f"{key}.{ending}", data) for ending, data in members.items()]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (sample(cls=b"1"), "sample 'k' has no picture"),
        (sample(jpg=b"x", png=b"x", cls=b"1"), "sample 'k' has two pictures"),
        (sample(jpg=b"x"), r"sample 'k' has no \.cls"),
        (sample(jpg=b"x", cls=b"one"), r"k\.cls holds no label  but b'one'"),
        (sample(jpg=b"x", cls=b""), r"k\.cls holds no label"),
        (sample(jpg=b"x", cls=b"-1"), "label of 'k' is -1"),
        (sample(jpg=b"x", cls=b"99999999999"), "label of 'k' is 99999999999"),
        (sample(jpg=b"x", cls=b"999999999"), "label of 'k' is 999999999"),
        (sample(jpg=b"x", cls=b"1", CLS=b"2"), r"sample 'k' has two \.cls"),
        (sample(jpg=b"x", cls=b"1", **{"pyd.gz": b"x"}), r"k\.pyd\.gz' may hold a program"),
        (
            [*sample(jpg=b"x", cls=b"1"), *sample("l", jpg=b"x", cls=b"1"), ("k.txt", b"x")],
            "sample 'k' do not follow one another",
        ),
        ([("README", b"x")], "holds no sample"),
        ([("../k.jpg", b"x"), ("../k.cls", b"1")], "leads out of its folder"),
        ([("pipe:touch executed.jpg", b"x"), ("pipe:touch executed.cls", b"1")], "start a program"),
        ([*sample(jpg=b"x", cls=b"1"), *sample(jpg=b"x")], "occurs twice"),
    ],
)
def test_what_is_no_plain_sample_is_refused_and_nothing_is_written(members, words, tmp_path, monkeypatch):
    folder = write(tmp_path / "tars", good=timm_s(range(3)), x=tar_of(members))
    monkeypatch.chdir(tmp_path)
    for hash in (False, True):
        with pytest.raises(ValueError, match=rf"x\.tar.*{words}"):
            run(folder, hash=hash)
    assert left(tmp_path) == ["good.tar", "tars", "x.tar"]


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "", " "])
def test_a_label_that_no_list_of_classes_can_hold_is_refused(name, tmp_path):
    members = sample(jpg=PICTURES[0], json=json.dumps({"name": name}).encode())
    folder = write(tmp_path / "tars", x=tar_of(members))
    with pytest.raises(ValueError, match=r"x\.tar: the label of 'k' is .* no class's name"):
        run(folder, label="json:name")
    assert left(folder) == ["x.tar"]


def test_a_picture_larger_than_an_index_can_say_is_refused(tmp_path):
    info = tarfile.TarInfo("k.jpg")
    info.size = 1 << 32
    path = write(tmp_path / "tars") / "x.tar"
    with open(path, "wb") as file:  # sparse: it takes no room on the disk
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(info.size, io.SEEK_CUR)
        file.write(tar_of([("k.cls", b"1")]))
    with pytest.raises(ValueError, match=r"x\.tar: k\.jpg has 4,294,967,296 bytes"):
        run(path)
    assert left(path.parent) == ["x.tar"]


def test_the_label_s_suffix_is_found_in_any_case(timm_tars):
    assert run(timm_tars, label="CLS").class_counts == (4, 4, 4)


def test_the_index_of_another_split_is_not_replaced(timm_tars):
    run(timm_tars, hash=True)
    before = {path.name: path.read_bytes() for path in timm_tars.iterdir()}
    with pytest.raises(ValueError, match=r"a\.idx is also the index of train\.manifest\.json"):
        run(timm_tars, split="all")
    assert {path.name: path.read_bytes() for path in timm_tars.iterdir()} == before
    assert run(timm_tars / "a.tar", split="half", hash=True).num_samples == 7  # the same index, so both hold
    assert check(timm_tars) == []


@pytest.mark.parametrize(
    "text", ["[1]", "no JSON", '{"splits": {"train": {"name": "train", "num_samples": 12, "url": "x"}}}']
)
def test_an_info_file_of_others_stays_as_it_is(text, timm_tars):
    (timm_tars / "_info.json").write_text(text)
    run(timm_tars, hash=True)
    assert (timm_tars / "_info.json").read_text() == text
    assert check(timm_tars) == []


def test_an_own_info_file_gets_the_split(timm_tars):
    run(timm_tars / "a.tar", split="half")
    run(timm_tars / "b.tar")
    splits = json.loads((timm_tars / "_info.json").read_text())["splits"]
    assert {name: split["filenames"] for name, split in splits.items()} == {"half": ["a.tar"], "train": ["b.tar"]}


def test_a_beton_of_the_same_samples_stays_recorded(timm_tars):
    manifest = run(timm_tars, hash=True)
    beton = BetonRecord("train.beton", 12, 1, "0" * 64, "0" * 64, "jpg", None, None)
    write_manifest(dataclasses.replace(manifest, beton=beton))
    assert run(timm_tars, hash=True).beton == beton
    assert run(timm_tars, hash=True, label="json:name").beton is None  # other classes, so other samples


class Executed:
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("ending", ["pyd", "pickle", "pkl", "pth"])
def test_pickles_are_refused_and_never_run(ending, tmp_path, monkeypatch):
    folder = write(tmp_path / "tars", x=tar_of(sample(jpg=PICTURES[0], cls=b"0", **{ending: pickle.dumps(Executed())})))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"k\.{ending}' may hold a program"):
        run(folder, hash=True)
    assert left(tmp_path) == ["tars", "x.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("k.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    folder = write(tmp_path / "tars", x=buffer.getvalue())
    with pytest.raises(ValueError, match=r"x\.tar: b'k\.jpg' is a"):
        run(folder)
    assert left(folder) == ["x.tar"]


def test_a_key_in_two_tars_is_refused(tmp_path):
    folder = write(tmp_path / "tars", a=timm_s(range(3)), b=timm_s(range(2, 5)))
    with pytest.raises(ValueError, match=r"b\.tar: sample 'n00002' is in another tar too"):
        run(folder)
    assert left(folder) == ["a.tar", "b.tar"]


def test_what_is_not_there_or_not_together_is_refused(timm_tars, tmp_path):
    for tars, words in (
        ((tmp_path / "none",), "holds no"),
        ((tmp_path / "none.tar",), "no \\*.tar that is there"),
        (("pipe:cat /etc/passwd",), "holds no"),
        ((timm_tars / "a.tar", write(tmp_path / "other", c=b"") / "c.tar"), "2 folders"),
        ((timm_tars / "a.tar", timm_tars / "a.tar"), "named twice"),
        ((tmp_path / "other",), "is empty"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            run(*tars)
    for option, value in (("label", "json"), ("label", "cls:x"), ("label", ""), ("split", "a/b"), ("processes", 0)):
        with pytest.raises(ValueError, match=f"--{option}"):
            IndexOptions((str(timm_tars),), **{option: value})


def test_a_manifest_of_this_project_s_own_shards_is_kept(copy):
    before = (copy / "train.manifest.json").read_bytes()
    with pytest.raises(ValueError, match="name another --split"):
        run(copy)
    assert (copy / "train.manifest.json").read_bytes() == before


def test_hashes_span_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.foreign._BLOCK", 1000)
    data = bytes(range(256)) * 40
    path = tmp_path / "x"
    path.write_bytes(data)
    places = [(0, 10), (10, 0), (990, 20), (1010, 5000), (6010, 1), (9000, 1240)]
    sha256, crcs = hashes_of(path, *zip(*places, strict=True))
    assert sha256 == hashlib.sha256(data).hexdigest()
    assert crcs == [zlib.crc32(data[offset : offset + size]) for offset, size in places]


def test_in_a_store(timm_tars):
    import fsspec

    fs = fsspec.filesystem("memory")
    for path in timm_tars.iterdir():
        fs.pipe_file(f"/foreign/{path.name}", path.read_bytes())
    manifest = run("memory://foreign", hash=True)
    here = run(timm_tars, hash=True)
    assert manifest.shards == here.shards
    assert fs.cat_file("/foreign/a.idx") == (timm_tars / "a.idx").read_bytes()
    assert fs.cat_file("/foreign/train.manifest.json") == (timm_tars / "train.manifest.json").read_bytes()


def test_other_libraries_tars_and_readers(tmp_path):
    """webdataset writes, this project indexes, webdataset and timm read on."""
    import webdataset
    from timm.data import create_dataset

    (tmp_path / "tars").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "tars" / "s-%06d.tar"), maxcount=5, verbose=0) as sink:
        for i, data in enumerate(PICTURES):
            sink.write({"__key__": f"sub/k{i}", "jpg": data, "cls": i % 3})
    run(tmp_path / "tars", hash=True)
    assert pictures_of(tmp_path / "tars") == [(data, i % 3) for i, data in enumerate(PICTURES)]
    assert check(tmp_path / "tars") == []
    tars = [str(path) for path in sorted((tmp_path / "tars").glob("*.tar"))]
    own = {sample.key: sample.label for tar in tars for sample in samples_in(Path(tar), "cls")}
    theirs = {s["__key__"]: int(s["cls"]) for s in webdataset.WebDataset(tars, shardshuffle=False)}
    assert own == theirs and len(own) == 12
    dataset = create_dataset("wds/", root=str(tmp_path / "tars"), split="train")
    assert sorted(label for _, label in dataset) == [0] * 4 + [1] * 4 + [2] * 4
    index_file = tmp_path / "tars" / "s-000000.idx"
    assert len(unpack_index(index_file.read_bytes(), index_file)) == 5
