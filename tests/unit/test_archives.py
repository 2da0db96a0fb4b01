"""ImageNet's archives and devkit, against the ImageFolders that people unpack from them."""

import io
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from scipy.io import loadmat, savemat
from twins import (
    META_FIELDS,
    devkit,
    held,
    ids_of,
    make_folder,
    meta_mat,
    pack_devkit,
    tar_of,
    train_tar,
    val_name,
    val_twin,
)

from data_prep.sources import Listing, Source
from data_prep.sources.archives import TrainArchive, ValArchive
from data_prep.sources.devkit import read_devkit
from data_prep.sources.image_folder import ImageFolder

WNIDS = ("n01440764", "n01443537", "n01484850", "n02012849", "n03126707")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures"), WNIDS, 7)


@pytest.fixture(scope="module")
def train(folder, tmp_path_factory) -> Path:
    return train_tar(folder, tmp_path_factory.mktemp("train") / "ILSVRC2012_img_train.tar")


@pytest.fixture(scope="module")
def val(folder, tmp_path_factory) -> tuple[Path, Path, Path]:
    return val_twin(folder, tmp_path_factory.mktemp("val"))


def columns(listing: Listing) -> tuple:
    """All that the shards depend on."""
    return listing.classes, listing.keys, listing.paths, listing.labels.tolist(), listing.runs


def assert_same(source: Source, folder: Path) -> None:
    assert columns(source.scan()) == columns(ImageFolder(folder).scan())
    assert held(source) == held(ImageFolder(folder))


def store(path: Path) -> str:
    """A copy of the file in a store."""
    url = f"memory://imagenet/{path.name}"
    fsspec.filesystem("memory").pipe_file(f"/imagenet/{path.name}", path.read_bytes())
    return url


def test_train_archive_is_its_folder(folder, train):
    assert_same(TrainArchive(str(train)), folder)


def test_val_archive_with_devkit_is_its_folder(val):
    archive, kit, folder = val
    assert_same(ValArchive(str(archive), str(kit)), folder)


def test_archives_of_real_pictures(imagenet_sample, tmp_path):
    assert_same(TrainArchive(str(train_tar(imagenet_sample, tmp_path / "train.tar"))), imagenet_sample)
    archive, kit, folder = val_twin(imagenet_sample, tmp_path)
    assert_same(ValArchive(str(archive), str(kit)), folder)


def test_archives_in_a_store(folder, train, val):
    assert_same(TrainArchive(store(train)), folder)
    archive, kit, val_folder = val
    source = ValArchive(store(archive), store(kit))
    assert_same(source, val_folder)
    listing = source.scan()
    stamps = [source.stamp(listing.sample(index)) for index in range(2)]
    assert stamps[0] != stamps[1] and stamps[0] == ValArchive(source.url, source.devkit).stamp(listing.sample(0))


@pytest.mark.parametrize("prefix", ["./", "val/", "./ILSVRC2012_img_val/"])
def test_val_archives_with_folders(folder, tmp_path, prefix):
    archive, kit, val_folder = val_twin(folder, tmp_path, prefix)
    assert_same(ValArchive(str(archive), str(kit)), val_folder)


def test_ids_are_no_labels(tmp_path):
    """The trap: ids in the ground truth follow the devkit's own table, not the order of the wnids."""
    truth = [WNIDS[index] for index in (3, 0, 4, 1, 2, 3)]
    ids = ids_of(WNIDS)
    assert [ids[wnid] for wnid in WNIDS] != [1, 2, 3, 4, 5]
    kit = read_devkit(str(devkit(truth, tmp_path)))
    assert kit.wnids == WNIDS
    assert kit.words == tuple(f"{wnid}, its name" for wnid in WNIDS)
    assert kit.labels == (3, 0, 4, 1, 2, 3)


def test_twin_of_meta_mat_is_laid_out_as_the_real_one():
    table = loadmat(io.BytesIO(meta_mat(WNIDS)))["synsets"]
    assert table.shape == (5 + 3, 1)
    first = table[0, 0]  # as public scripts read the real file
    assert first[0].shape == (1, 1) and first[0][0][0] == 1
    assert ids_of(WNIDS)[first[1][0]] == 1
    assert first["words"][0].endswith("its name")
    squeezed = loadmat(io.BytesIO(meta_mat(WNIDS)), squeeze_me=True)["synsets"]
    assert [row[4] for row in squeezed.tolist()] == [0] * 5 + [2] * 3
    assert max(row[0] for row in squeezed.tolist()) == 8


@pytest.mark.parametrize("kind", ["object 1-D", "typed"])
def test_other_layouts_of_meta_mat(tmp_path, kind):
    rows = [(2, "n2", "two", "", 0, 0, 0), (1, "n1", "one", "", 0, 0, 0), (3, "n3", "inner", "", 2, 0, 0)]
    if kind == "typed":
        types = ["i4", "U9", "U40", "U9", "i4", "i4", "i4"]
        table = np.array(rows, dtype=list(zip(META_FIELDS, types, strict=True)))
    else:
        table = np.array(rows, dtype=[(name, object) for name in META_FIELDS])
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": table, "other": 1})
    kit = read_devkit(str(pack_devkit(tmp_path, buffer.getvalue(), b"2\n1\n2\n")))
    assert kit == (("n1", "n2"), ("one", "two"), (1, 0, 1))


def test_devkit_unpacked(tmp_path):
    archive = devkit(list(WNIDS), tmp_path)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    whole = read_devkit(str(archive))
    assert read_devkit(str(tmp_path / "unpacked")) == whole
    assert read_devkit(str(tmp_path / "unpacked" / "ILSVRC2012_devkit_t12")) == whole


def test_devkits_that_are_refused(tmp_path):
    truth = [*WNIDS, WNIDS[0]]
    meta = meta_mat(truth)
    lines = "".join(f"{ids_of(truth)[wnid]}\n" for wnid in truth).encode()

    def refused(meta: bytes, truth: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_devkit(str(pack_devkit(tmp_path, meta, truth)))

    refused(meta, lines + b"6\n", "line 7 is '6', which is no id of a class")  # an inner node's
    refused(meta, b"x" + lines, "ground_truth.txt, line 1 is 'x")
    refused(meta[:200], lines, r"data/meta\.mat cannot be read .* fetch ILSVRC2012_devkit_t12\.tar\.gz again")
    refused(b"", lines, r"meta\.mat cannot be read")
    whole = pack_devkit(tmp_path, meta, lines).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.tar\.gz cannot be read"):
        read_devkit(str(tmp_path / "cut.tar.gz"))
    (tmp_path / "other.tar.gz").write_bytes(tar_of([("devkit/data/meta.mat", meta)]))
    with pytest.raises(ValueError, match=r"holds no data/ILSVRC2012_validation_ground_truth\.txt"):
        read_devkit(str(tmp_path / "other.tar.gz"))
    with pytest.raises(ValueError, match=r"holds no data/meta\.mat with"):
        read_devkit(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"--devkit .*none does not exist: name ILSVRC2012_devkit_t12"):
        read_devkit(str(tmp_path / "none"))
    twice = np.array([(1, "n1", "", "", 0, 0, 0)] * 2, dtype=[(name, object) for name in META_FIELDS])
    savemat(buffer := io.BytesIO(), {"synsets": twice})
    refused(buffer.getvalue(), b"1\n", "names a class twice, or none")


@pytest.mark.parametrize(
    ("numbers", "truth", "message"),
    [
        ([1, 2, 4, 5], WNIDS, r"holds 4 of the 5 pictures .* first missing is ILSVRC2012_val_00000003\.JPEG: fetch"),
        ([1, 2, 3, 4, 5, 6], WNIDS, r"ILSVRC2012_val_00000006\.JPEG has no line in the ground truth .* has 5:"),
        ([0, 1, 2, 3, 4], WNIDS, r"ILSVRC2012_val_00000000\.JPEG has no line"),
        ([1, 2, 3, 4, 5, 5], WNIDS, r"ILSVRC2012_val_00000005\.JPEG' occurs twice"),
    ],
)
def test_numbers_that_do_not_go_together(tmp_path, numbers, truth, message):
    archive = tmp_path / "val.tar"
    archive.write_bytes(tar_of((val_name(number), b"x") for number in numbers))
    with pytest.raises(ValueError, match=message):
        ValArchive(str(archive), str(devkit(list(truth), tmp_path))).scan()


def test_a_class_without_pictures_in_the_ground_truth(tmp_path):
    lines = b"1\n2\n3\n4\n"
    archive = tmp_path / "val.tar"
    archive.write_bytes(tar_of((val_name(number), b"x") for number in (1, 2, 3, 4)))
    missing = next(wnid for wnid, number in ids_of(WNIDS).items() if number == 5)
    with pytest.raises(ValueError, match=f"1 of 5 classes have no picture in the ground truth, the first is {missing}"):
        ValArchive(str(archive), str(pack_devkit(tmp_path, meta_mat(WNIDS), lines))).scan()


@pytest.mark.parametrize("name", ["ILSVRC2012_test_00000001.JPEG", "readme.txt", "ILSVRC2012_val_1.JPEG"])
def test_other_members_of_a_val_archive(tmp_path, name):
    archive = tmp_path / "val.tar"
    archive.write_bytes(tar_of([(name, b"x")]))
    with pytest.raises(ValueError, match=rf"val\.tar: {name} is not ILSVRC2012_val_<8 digits>\.JPEG"):
        ValArchive(str(archive), str(devkit(list(WNIDS), tmp_path))).scan()


def scan_train(path: Path, members: list[tuple[str, bytes]]) -> Listing:
    path.write_bytes(tar_of(members))
    return TrainArchive(str(path)).scan()


ONE = tar_of([("n1_1.JPEG", b"one")])
TWO = tar_of([("n1_1.JPEG", b"one"), ("n1_2.JPEG", b"two")])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("n1.tar", ONE), ("readme.txt", b"x")], r"train\.tar: readme\.txt is no tar of a class's pictures"),
        ([("n1.tar", ONE), ("a/n1.tar", ONE)], r"a/n1\.tar is there twice"),
        ([("n1.tar", tar_of([]))], r"n1\.tar holds no pictures"),
        ([("n1.tar", tar_of([("x.txt", b"x")]))], r"train\.tar: n1\.tar: x\.txt is no picture by its name"),
        ([("n1.tar", tar_of([("n1_1.JPEG", b"x")] * 2))], r"n1\.tar: 'n1_1\.JPEG' occurs twice"),
        ([("n1.tar", tar_of([("../n1_1.JPEG", b"x")]))], r"\.\./n1_1\.JPEG"),
        ([("n1.tar", tar_of([("n1_1.JPEG", bytes(5000))])[:3072])], r"train\.tar"),
        ([("n1.tar", ONE[:400])], r"train\.tar"),
        ([("n1.tar", ONE[:1024])], r"train\.tar"),  # without its end mark
        ([("n1.tar", TWO[:1030] + b"\xff" + TWO[1031:])], r"train\.tar"),  # the second header is damaged
        ([("n1.tar", b"\1" * 10240)], r"train\.tar"),
    ],
)
def test_train_archives_that_are_refused(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        scan_train(tmp_path / "train.tar", members)
    url = store(tmp_path / "train.tar")
    with pytest.raises(ValueError, match=message):
        TrainArchive(url).scan()


def test_links_are_refused_in_an_inner_tar(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("n1_1.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"n1_1\.JPEG"):
        scan_train(tmp_path / "train.tar", [("n1.tar", buffer.getvalue())])


def test_names_of_pictures_are_free_and_hidden_files_are_passed_over(tmp_path):
    inner = tar_of([("./b.png", b"b"), ("sub/c.jpg", b"c"), ("._b.png", b"junk"), ("a.JPEG", b"a")])
    listing = scan_train(tmp_path / "train.tar", [("./n1.tar", inner), ("./._n1.tar", b"junk")])
    assert listing.classes == ("n1",)
    assert listing.paths == ["n1/a.JPEG", "n1/b.png", "n1/sub/c.jpg"]
    for name, data in (("a.JPEG", b"a"), ("b.png", b"b"), ("sub/c.jpg", b"c")):
        (tmp_path / "folder" / "n1" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / "n1" / name).write_bytes(data)
    assert_same(TrainArchive(str(tmp_path / "train.tar")), tmp_path / "folder")


def test_an_archive_cut_anywhere_is_refused(train, tmp_path):
    whole = train.read_bytes()
    cut = tmp_path / "train.tar"
    for size in (len(whole) // 3, len(whole) // 2 + 7):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"train\.tar"):
            TrainArchive(str(cut)).scan()


def test_an_archive_cut_after_it_was_listed(train, tmp_path):
    whole = train.read_bytes()
    (tmp_path / "train.tar").write_bytes(whole)
    for url in (str(tmp_path / "train.tar"), store(tmp_path / "train.tar")):
        source = TrainArchive(url)
        listing = source.scan()
        assert listing.places is not None
        last = listing.sample(int(listing.places[:, 0].argmax()))
        stamp = source.stamp(last)
        offset, size = last.place
        cut = whole[: offset + size - 1]
        (tmp_path / "train.tar").write_bytes(cut)
        fsspec.filesystem("memory").pipe_file("/imagenet/train.tar", cut)
        with pytest.raises(OSError, match=f"{last.path} has {size - 1:,} of {size:,} bytes"):
            list(source.read([last]))
        assert TrainArchive(url).stamp(last) != stamp
        (tmp_path / "train.tar").write_bytes(whole)
        store(tmp_path / "train.tar")


def test_archives_that_are_not_there(tmp_path):
    for url in (str(tmp_path / "none.tar"), "memory://imagenet/none.tar"):
        with pytest.raises(FileNotFoundError, match=r"none\.tar"):
            TrainArchive(url).scan()
