"""Parquet files as the Hugging Face hub ships them, against the ImageFolder that they were made from."""

import random
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from twins import held, make_folder, parquet_files, write_parquet

from data_prep.sources import Listing
from data_prep.sources.image_folder import ImageFolder
from data_prep.sources.parquet import Parquet, find_parquet

WNIDS = ("n01440764", "n01443537", "n02012849", "n03126707")
PLAIN = [b"first", b"second", b"third"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures"), WNIDS, 9)


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory) -> Path:
    """36 rows in 3 files, whose row groups have 4."""
    return parquet_files(folder, tmp_path_factory.mktemp("hub"))


def plain(path: Path, labels: list, images: list | None = None, **options) -> Parquet:
    """A source of one file that has no paths."""
    images = PLAIN[: len(labels)] if images is None else images
    return Parquet((str(write_parquet(path, images, labels, **({"image_type": pa.binary()} | options))),))


def test_with_wnids_labels_keys_and_bytes_are_those_of_the_folder(folder, files):
    source = Parquet(find_parquet(str(files)), WNIDS)
    assert held(source) == held(ImageFolder(folder))
    listing = source.scan()
    assert listing.classes == WNIDS
    assert listing.class_names == tuple(f"{name}, its name" for name in WNIDS)
    assert len(set(listing.keys)) == len(listing)


def test_of_real_pictures_too(imagenet_sample, tmp_path):
    folder = parquet_files(imagenet_sample, tmp_path, files=4, rows_per_group=16)
    classes = ImageFolder(imagenet_sample).scan().classes
    assert held(Parquet(find_parquet(str(folder)), classes)) == held(ImageFolder(imagenet_sample))


def test_names_in_the_files_are_the_classes_where_none_are_given(files):
    listing = Parquet(find_parquet(str(files))).scan()
    assert listing.classes == tuple(f"{name}, its name" for name in WNIDS)
    assert listing.class_names == ()
    assert all(path.startswith("n0") for path in [path.split("/")[1] for path in listing.paths])


def test_order_and_runs_are_those_of_the_row_groups(files):
    listing = Parquet(find_parquet(str(files)), WNIDS).scan()
    assert listing.runs == (4, 4, 4) * 3
    assert listing.places is not None
    assert listing.places.tolist() == [
        [file, group, row] for file in range(3) for group in range(3) for row in range(4)
    ]
    labels = [label for path in sorted(files.iterdir()) for label in pq.read_table(path)["label"].to_pylist()]
    assert listing.labels.tolist() == labels


class Reads:
    """Counts the row groups whose pictures were read, and the rows that were decoded of them."""

    def __init__(self, monkeypatch) -> None:
        self.groups = self.rows = 0
        original = pq.ParquetFile.iter_batches

        def counted(file, *args, **options):
            self.groups += 1
            for batch in original(file, *args, **options):
                self.rows += len(batch)
                yield batch

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)


def read(source: Parquet, listing: Listing, indices: list[int]) -> list[bytes]:
    return list(source.read([listing.sample(index) for index in indices]))


def test_each_row_group_is_read_once_whatever_the_order(files, monkeypatch):
    source = Parquet(find_parquet(str(files)))
    listing = source.scan()
    mixed = random.Random(0).sample(range(len(listing)), len(listing))
    expected = [read(source, listing, [index])[0] for index in mixed]
    reads = Reads(monkeypatch)
    assert read(source, listing, mixed) == expected
    assert (reads.groups, reads.rows) == (9, 36)


def test_only_what_is_needed_of_a_row_group_is_decoded(tmp_path, monkeypatch):
    images = [bytes([row]) * 1000 for row in range(200)]
    source = plain(tmp_path / "a.parquet", [0] * 200, images, rows_per_group=100)
    listing = source.scan()
    reads = Reads(monkeypatch)
    assert read(source, listing, [140, 120, 101, 120]) == [images[140], images[120], images[101], images[120]]
    assert (reads.groups, reads.rows) == (1, 64)  # two pieces of 32


def test_a_subset_asks_only_for_its_own_files(files, tmp_path):
    source = Parquet(find_parquet(str(files)))
    listing = source.scan()
    gone = Parquet((source.files[0], str(tmp_path / "gone.parquet"), source.files[2]))
    assert read(gone, listing, [3, 30]) == read(source, listing, [3, 30])
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet is missing"):
        read(gone, listing, [15])


def test_in_a_store_it_is_the_same(folder, files):
    fs = fsspec.filesystem("memory")
    for path in files.iterdir():
        fs.pipe_file(f"/hub/{path.name}", path.read_bytes())
    found = find_parquet("memory://hub/train-*.parquet")
    assert found == tuple(f"memory://hub/train-0000{number}-of-00003.parquet" for number in range(3))
    source = Parquet(found, WNIDS)
    assert held(source) == held(ImageFolder(folder))
    local = Parquet(find_parquet(str(files)), WNIDS)
    assert source.scan().sha256() == local.scan().sha256()
    sample = source.scan().sample(0)
    assert source.stamp(sample) == source.stamp(sample) != source.stamp(source.scan().sample(1))
    with pytest.raises(FileNotFoundError, match=r"memory://hub/none\.parquet is missing"):
        Parquet(("memory://hub/none.parquet",)).scan()


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())])])
def test_kinds_of_image_columns(tmp_path, kind):
    images = [{"bytes": data} for data in PLAIN] if pa.types.is_struct(kind) else PLAIN
    source = plain(tmp_path / "a.parquet", [0, 1, 0], images, image_type=kind)
    listing = source.scan()
    assert listing.paths == ["0/a-00000000.jpg", "1/a-00000001.jpg", "0/a-00000002.jpg"]
    assert read(source, listing, [2, 0, 1]) == [PLAIN[2], PLAIN[0], PLAIN[1]]


@pytest.mark.parametrize(
    ("kind", "labels", "classes"),
    [
        (pa.int32(), [1, 0, 1], ("0", "1")),
        (pa.uint8(), [1, 0, 1], ("0", "1")),
        (pa.dictionary(pa.int8(), pa.int64()), [1, 0, 1], ("0", "1")),
        (pa.string(), ["cow", "ant", "cow"], ("ant", "cow")),
        (pa.dictionary(pa.int32(), pa.string()), ["cow", "ant", "cow"], ("ant", "cow")),
    ],
)
def test_kinds_of_labels(tmp_path, kind, labels, classes):
    listing = plain(tmp_path / "a.parquet", labels, label_type=kind).scan()
    assert listing.classes == classes
    assert listing.labels.tolist() == [1, 0, 1]


def test_names_that_tell_pictures_apart_are_kept_and_others_not(tmp_path):
    paths = ["cat.jpg", "cat.jpg", None, "a/b/dog.png", ".."]
    images = [{"bytes": b"x", "path": path} for path in paths]
    names = ["n01440764"]
    listing = Parquet((str(write_parquet(tmp_path / "a.parquet", images, [0] * 5, names)),)).scan()
    stems = ["cat.jpg", "a-00000001.jpg", "a-00000002.jpg", "dog.png", "a-00000004.jpg"]
    assert listing.paths == [f"n01440764/{stem}" for stem in stems]


def test_stamp_changes_with_the_file_and_the_row(tmp_path):
    source = plain(tmp_path / "a.parquet", [0, 1, 0])
    listing = source.scan()
    stamps = [source.stamp(listing.sample(index)) for index in range(3)]
    assert len(set(stamps)) == 3
    plain(tmp_path / "a.parquet", [0, 1, 0], [b"other", b"second", b"third"])
    assert source.stamp(listing.sample(0)) != stamps[0]


def test_finding_files(files, tmp_path):
    one = find_parquet(str(files / "train-00001-of-00003.parquet"))
    assert one == (str(files / "train-00001-of-00003.parquet"),)
    assert find_parquet(str(files / "train-*.parquet")) == find_parquet(str(files)) == find_parquet(f"{files}/")
    assert find_parquet(str(tmp_path)) == find_parquet(str(tmp_path / "none")) == ()
    for name in ("train-0.parquet", "validation-0.parquet", "._train-0.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds several splits \(train, validation\): name one .*/train-\*\.parquet'"):
        find_parquet(str(tmp_path))
    assert find_parquet(str(tmp_path / "v*.parquet")) == (str(tmp_path / "validation-0.parquet"),)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, -1], {}, r"a\.parquet, row 1: its label is -1: name files of a split with labels"),
        ([0, None], {}, r"a\.parquet, row 1: it has no label"),
        ([0, 2], {"names": ["x", "y"]}, r"a\.parquet, row 1: its label is 2: 2 classes are known"),
        ([0, 0], {"names": ["x", "y"]}, r"1 of 2 classes have no picture, the first is 'y'"),
        ([0, 10**6], {}, r"has a label 1,000,000 but 2 rows: labels must be 0 to n-1"),
        ([], {}, "has no rows"),
        ([0.5], {"label_type": pa.float32()}, "column `label` is float: it must hold integers or names"),
        ([0], {"images": ["text"], "image_type": pa.string()}, "column `image` is string: it must be binary"),
        ([2**63], {"label_type": pa.uint64()}, r"a\.parquet"),
    ],
)
def test_labels_and_columns_that_are_refused(tmp_path, labels, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        plain(tmp_path / "a.parquet", labels, **options).scan()


def test_classes_that_do_not_fit_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"--classes names 2 classes, .*train-00000-of-00003\.parquet has 4"):
        Parquet(find_parquet(str(files)), WNIDS[:2]).scan()
    first = write_parquet(tmp_path / "a.parquet", PLAIN[:2], [0, 1], ["x", "y"], image_type=pa.binary())
    other = write_parquet(tmp_path / "b.parquet", PLAIN[:2], [0, 1], ["y", "x"], image_type=pa.binary())
    with pytest.raises(ValueError, match=r"b\.parquet and .*a\.parquet differ in class names"):
        Parquet((str(first), str(other))).scan()
    texts = plain(tmp_path / "c.parquet", ["ant", "bee"], label_type=pa.string()).files
    with pytest.raises(ValueError, match=r"c\.parquet, row 1: its label is 'bee': 2 classes are known"):
        Parquet(texts, ("ant", "cow")).scan()


def test_a_row_without_a_picture_is_refused_when_it_is_read(tmp_path):
    images = [{"bytes": b"x", "path": None}, {"bytes": None, "path": "elsewhere.jpg"}, None]
    source = Parquet((str(write_parquet(tmp_path / "a.parquet", images, [0, 0, 0])),))
    listing = source.scan()
    assert read(source, listing, [0]) == [b"x"]
    for row in (1, 2):
        with pytest.raises(ValueError, match=rf"a\.parquet, row {row} of row group 0 holds no picture's bytes"):
            read(source, listing, [row])


def test_a_damaged_file_is_named(tmp_path):
    source = plain(tmp_path / "a.parquet", [0, 1, 0], [random.Random(0).randbytes(20_000) for _ in range(3)])
    listing = source.scan()
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-9])
    with pytest.raises(OSError, match=r"a\.parquet cannot be read as Parquet .*Fetch it again"):
        source.scan()
    (tmp_path / "a.parquet").write_bytes(bytes(60_000) + whole[60_000:])
    with pytest.raises(OSError, match=r"a\.parquet cannot be read as Parquet"):
        read(source, listing, [1])
    with pytest.raises(ValueError, match=r"b\.parquet has no column 'image' \(its columns: label, other\)"):
        pq.write_table(pa.table({"label": [1], "other": [2]}), tmp_path / "b.parquet")
        Parquet((str(tmp_path / "b.parquet"),)).scan()
    plain(tmp_path / "a.parquet", [0], PLAIN[:1])
    with pytest.raises(OSError, match="row group 0 has 1 rows, more were listed: it was changed"):
        read(source, listing, [1])


def test_without_pyarrow_the_mend_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="need pyarrow, which is missing: run `make setup`"):
        Parquet((str(tmp_path / "a.parquet"),)).scan()
