"""Which source a path names, and the files of class names that go with it."""

import json
from pathlib import Path

import fsspec
import pytest
from twins import make_folder, parquet_files, tar_of, train_tar, val_twin

from data_prep.sources.archives import TrainArchive, ValArchive
from data_prep.sources.choose import open_source
from data_prep.sources.image_folder import ImageFolder, RemoteImageFolder
from data_prep.sources.names import read_class_names, read_classes
from data_prep.sources.parquet import Parquet

WNIDS = ("n01440764", "n01443537")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures"), WNIDS, 2)


def test_folders(folder, tmp_path):
    assert open_source(str(folder)) == ImageFolder(folder)
    assert open_source(f"file://{folder}") == ImageFolder(folder)
    assert open_source("memory://pictures/") == RemoteImageFolder("memory://pictures")
    with pytest.raises(FileNotFoundError, match="does not exist: name a folder"):
        open_source(str(tmp_path / "none")).scan()


def test_archives(folder, tmp_path):
    train = train_tar(folder, tmp_path / "train.tar")
    assert open_source(str(train)) == TrainArchive(str(train))
    archive, kit, _ = val_twin(folder, tmp_path, "val/")
    assert open_source(str(archive), str(kit)) == ValArchive(str(archive), str(kit))
    fsspec.filesystem("memory").pipe_file("/choose/train.tar", train.read_bytes())
    assert open_source("memory://choose/train.tar") == TrainArchive("memory://choose/train.tar")
    for url in (str(tmp_path / "none.tar"), "memory://choose/none.tar"):
        with pytest.raises(FileNotFoundError, match=r"none\.tar"):
            open_source(url)


def test_parquet(folder, tmp_path):
    files = parquet_files(folder, tmp_path / "hub", files=1)
    file = str(files / "train-00000-of-00001.parquet")
    for url in (str(files), file, str(files / "train-*.parquet")):
        assert open_source(url) == Parquet((file,))
    (tmp_path / "classes.txt").write_text("n01440764\nn01443537\n\n")
    assert open_source(str(files), classes=str(tmp_path / "classes.txt")) == Parquet((file,), WNIDS)
    for name in ("none.parquet", "none-*.parquet"):
        with pytest.raises(FileNotFoundError, match=r"names no file: name a folder of \*\.parquet"):
            open_source(str(files / name))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.JPEG", b"x")], r"tar of pictures without classes: give --devkit ILSVRC2012_devkit_t12\.tar\.gz"),
        ([("0.cls", b"1"), ("0.jpg", b"x")], "is a WebDataset shard: .* `python -m data_prep index`"),
        ([("0.jpg", b"x"), ("0.cls", b"1")], "is a WebDataset shard"),
        ([("0.jpg", b"x"), ("0.json", b"{}")], "is a WebDataset shard"),
        ([("a.exe", b"x")], r"begins with a\.exe, which is neither picture nor tar of pictures"),
    ],
)
def test_tars_that_are_refused(tmp_path, members, message):
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "a.tar"))


def test_options_that_would_not_be_read_are_refused(folder, tmp_path):
    train = str(train_tar(folder, tmp_path / "train.tar"))
    files = str(parquet_files(folder, tmp_path / "hub", files=1))
    for url in (str(folder), files, train):
        with pytest.raises(ValueError, match=r"--devkit kit: source .* would not read it: leave it out"):
            open_source(url, devkit="kit")
    for url in (str(folder), train):
        with pytest.raises(ValueError, match=r"--classes names: source .* would not read it: leave it out"):
            open_source(url, classes="names")
    with pytest.raises(ValueError, match=r"is compressed, .* unpack it first"):
        open_source("train.tar.gz")
    with pytest.raises(ValueError, match=r"--devkit kit: source .* is a manifest of shards"):
        open_source("train.manifest.json", devkit="kit")
    with pytest.raises(ValueError, match="shards of a store cannot be a source"):
        open_source("memory://x/train.manifest.json")


@pytest.mark.parametrize(
    "text",
    [
        "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn9 other\nn9 twice\n",
        "\ufeffn01443537\tgoldfish\r\n\r\nn01440764  tench, Tinca tinca\r\n",
        json.dumps({"n01440764": "tench, Tinca tinca", "n01443537": "goldfish", "n9": "other"}),
        json.dumps({"1": ["n01443537", "goldfish"], "0": ["n01440764", "tench, Tinca tinca"]}, indent=1),
    ],
)
def test_readable_names(tmp_path, text):
    (tmp_path / "names").write_text(text, encoding="utf-8")
    assert read_class_names(str(tmp_path / "names"), WNIDS) == ("tench, Tinca tinca", "goldfish")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01440764 tench\n", r"no name for class 'n01443537' \(1 of 2 classes have none\)"),
        ("n01440764 tench\nn01440764 other\n", r"class 'n01440764' twice \('tench', 'other'\)"),
        ('{"n01440764": "tench", "n01440764": "other"}', "class 'n01440764' twice"),
        ("n01440764 tench\nn01443537\n", "line 2 is 'n01443537': each line must be `<class> <name>`"),
        ('{"n01440764": "tench"', "begins as JSON but cannot be read"),
        ('{"n01440764": 3}', "'n01440764' has 3: it must be a name, or"),
        ('{"n01440764": ["a", "b", "c"]}', "it must be a name, or"),
        ('{"n01440764": {"a": "b"}}', "it must be a name, or"),
        ('{"n01440764": "a\\nb"}', "it must be one line of text"),
        ("", r"no name for class 'n01440764' \(2 of 2"),
    ],
)
def test_readable_names_that_are_refused(tmp_path, text, message):
    (tmp_path / "names").write_text(text)
    with pytest.raises(ValueError, match=rf"names.*{message}"):
        read_class_names(str(tmp_path / "names"), WNIDS)


def test_lists_of_classes(tmp_path):
    path = tmp_path / "classes.txt"
    for text, message in (("a\n\nb\n", "line 2 is empty"), ("a\nb\na\n", "line 3 names 'a', as line 1"), ("", "empty")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"classes\.txt.*{message}"):
            read_classes(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"classes\.txt is not UTF-8 text"):
        read_classes(str(path))
    with pytest.raises(FileNotFoundError, match="none"):
        read_classes(str(tmp_path / "none"))
