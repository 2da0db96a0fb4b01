"""`stats`: figures of a split whose pictures are known, duplicates in and between splits, and the page."""

import dataclasses
import hashlib
import io
import json
import re
import shutil
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import fsspec
import pytest
from source_pictures import picture

from data_prep.manifest import BetonRecord, Manifest, Note, pack_index, read_manifest, unpack_index, write_manifest
from data_prep.stats import StatsOptions, stats
from data_prep.stats.tables import duplicate_tables, how_counted, summary_tables
from data_prep.storage import LocalFolder
from data_prep.tar_shards import write_tar

HOSTILE = "<script>alert(1)</script> & [bold]\x1b[2J"


class Sample(NamedTuple):
    key: str
    label: int


def jpeg(seed: int, width: int = 40, height: int = 30, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    picture(seed, height, width).convert(mode).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def with_crc(data: bytes, size: int, crc: int) -> bytes:
    """The JPEG with bytes behind its end, such that size and CRC-32 are as wanted. CRCs are linear over bits."""
    data += bytes(size - 4 - len(data))
    base = zlib.crc32(data + bytes(4))
    wanted, patch, basis = base ^ crc, 0, {}
    for bit in range(32):
        effect, bits = zlib.crc32(data + (1 << bit).to_bytes(4, "little")) ^ base, 1 << bit
        while effect and effect.bit_length() in basis:
            other = basis[effect.bit_length()]
            effect, bits = effect ^ other[0], bits ^ other[1]
        basis[effect.bit_length()] = effect, bits
    while wanted:
        effect, bits = basis[wanted.bit_length()]
        wanted, patch = wanted ^ effect, patch ^ bits
    return data + patch.to_bytes(4, "little")


def write_split(
    folder: Path, split: str, classes: tuple[str, ...], shards: list[list[tuple[str, str, bytes]]], **fields
):
    """`shards`: (key, class, bytes) of each picture. Returns the manifest's path."""
    records = [
        write_tar(
            LocalFolder(folder),
            f"{split}-{number:06d}.tar",
            [(Sample(key, classes.index(name)), data) for key, name, data in shard],
        )
        for number, shard in enumerate(shards)
    ]
    names = [name for shard in shards for _, name, _ in shard]
    counts = tuple(names.count(name) for name in classes)
    return write_manifest(Manifest(split, classes, counts, tuple(records), {}, {}, **fields, folder=folder))


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> Path:
    """Two splits with 12 and 4 pictures. Equal: a with b; c in two classes; d with a picture of val; e in all."""
    folder = tmp_path_factory.mktemp("splits")
    grey, progressive = jpeg(1, mode="L"), jpeg(2, 60, 20, progressive=True, subsampling="4:2:0")
    exif = b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65535 - 8)
    late = jpeg(3, 64, 64, subsampling="4:4:4")
    late = late[:2] + exif + exif + late[2:]  # its frame header lies behind the first pages that are read
    collides = jpeg(4, subsampling="4:2:2") + bytes(500)
    forged = with_crc(jpeg(5, subsampling="4:2:2"), len(collides), zlib.crc32(collides))
    a, c, d, e = (jpeg(seed, subsampling="4:2:0") for seed in (6, 7, 8, 9))
    classes = ("ant", "bee", HOSTILE)
    train = [
        [("a", "ant", a), ("grey", "ant", grey), ("c1", "ant", c), ("e1", "bee", e), ("x", HOSTILE, collides)],
        [
            ("b", "ant", a),
            ("c2", "bee", c),
            ("d1", HOSTILE, d),
            ("y", "ant", forged),
            ("progressive", "bee", progressive),
        ],
        [("late", "ant", late), ("e2", "bee", e)],
    ]
    repaired = (Note("grey", "grey.jpg", "JPEG, mode L"), Note("c1", "c1.png", "PNG, mode RGB"))
    repaired = (*repaired, Note("c2", "c2.png", "PNG, mode RGB"))
    names = ("Formicidae", "Apis & co", "")
    write_split(folder, "train", classes, train, repaired=repaired, class_names=names)
    val = [[("v", "ant", jpeg(10)), ("d2", HOSTILE, d), ("e3", "bee", e), ("w", "bee", jpeg(11))]]
    # In another order: classes are compared by name, not by number.
    write_split(folder, "val", classes[::-1], val, skipped=(Note("z", "z.jpg", "the file is empty"),))
    return folder


@pytest.fixture(scope="module")
def found(splits):
    return stats(StatsOptions(paths(splits), output=splits / "stats.html", processes=1))


@pytest.fixture
def copy(splits, tmp_path) -> Path:
    return Path(shutil.copytree(splits, tmp_path / "copy"))


def paths(folder: Path) -> tuple[str, str]:
    return str(folder / "train.manifest.json"), str(folder / "val.manifest.json")


def of(folder: Path, **options):
    return stats(StatsOptions(paths(folder), processes=1, **options))


def keys(group) -> list[str]:
    return [copy.key for copy in group.copies]


# ---- figures ----


def test_sizes_forms_and_classes_are_those_that_were_written(splits, found):
    train, val = found.splits
    assert (train.name, train.pictures, train.shards, val.name, val.pictures) == ("train", 12, 3, "val", 4)
    assert train.spreads["width"].min == 40 and train.spreads["width"].max == 64
    assert train.spreads["height"].min == 20 and train.spreads["height"].median == 30
    assert train.spreads["shorter_side"].max == 64
    assert train.spreads["aspect_ratio"].max == 3 and train.spreads["aspect_ratio"].min == 1
    assert train.spreads["width"].mean == pytest.approx((10 * 40 + 60 + 64) / 12)
    assert [(s.width, s.height, s.pictures) for s in train.sizes] == [(40, 30, 10), (60, 20, 1), (64, 64, 1)]
    assert train.different_sizes == 3
    assert train.forms == {"4:2:0": 8, "4:2:2": 2, "4:4:4": 1, "grey": 1}
    assert train.progressive == 1
    assert [(c.name, c.readable, c.pictures) for c in train.classes] == [
        ("ant", "Formicidae", 6),
        ("bee", "Apis & co", 4),
        (HOSTILE, "", 2),
    ]
    assert train.repaired == {"PNG, mode RGB": 2, "JPEG, mode L": 1} and val.skipped == {"the file is empty": 1}
    records = read_manifest(splits / "train.manifest.json").shards
    sizes = [
        entry.size for r in records for entry in unpack_index((splits / r.index_name).read_bytes(), Path(r.index_name))
    ]
    assert train.bytes == sum(sizes) and train.spreads["bytes"].max == max(sizes)
    assert train.shard_bytes == sum((splits / record.name).stat().st_size for record in records)
    assert train.read_whole == val.read_whole == 0


def test_histograms_hold_every_picture_once(found):
    for split in found.splits:
        h = split.histograms
        assert h.sides.sum() == h.aspect.sum() == h.bytes.sum() == h.bits.sum() == split.pictures


# ---- duplicates ----


def test_duplicates_in_and_between_splits(found):
    d = found.duplicates
    assert (d.groups, d.pictures, d.groups_of_two_classes) == (4, 9, 1)
    assert [(c.place, c.groups, c.pictures, c.groups_of_two_classes) for c in d.counts] == [
        ("within train", 3, (6,), 1),
        ("within val", 0, (0,), 0),
        ("train and val", 2, (3, 2), 0),
    ]
    assert [keys(group) for group in d.two_classes] == [["c1", "c2"]]
    assert [copy.class_name for copy in d.two_classes[0].copies] == ["ant", "bee"]
    assert [keys(group) for group in d.one_class] == [
        ["e1", "e2", "e3"],
        ["d1", "d2"],
        ["a", "b"],
    ]  # across splits first
    last = d.one_class[0].copies[-1]
    assert (last.split, last.shard, last.sample_id, last.class_name) == ("val", "val-000000.tar", 2, "bee")


def test_pictures_of_one_size_and_crc_are_told_apart(found):
    """x and y were forged to agree in both."""
    assert (found.duplicates.compared, found.duplicates.collisions) == (9 + 2, 2)


def test_only_pictures_of_one_size_and_crc_are_read_whole(copy):
    """Bytes behind a header may be anything where no other picture can be equal: `verify` is for that."""
    record = read_manifest(copy / "train.manifest.json").shards[2]
    late, e2 = unpack_index((copy / record.index_name).read_bytes(), Path(record.index_name))
    flip(copy / record.name, late.offset + late.size - 20)
    assert of(copy).duplicates.groups == 4
    flip(copy / record.name, e2.offset + e2.size - 20)
    with pytest.raises(
        ValueError, match=r"train-000002\.tar is damaged.*CRC.*data_prep verify .*train\.manifest\.json"
    ):
        of(copy)


def test_listed_bounds_what_is_named_and_not_what_is_counted(splits, found):
    few = of(splits, listed=1)
    assert [keys(group) for group in few.duplicates.one_class] == [["e1", "e2", "e3"]]
    assert few.duplicates.counts == found.duplicates.counts
    assert "1 of 3 groups are shown" in few.text()
    none = of(splits, listed=0)
    assert none.duplicates.groups == 4 and not none.duplicates.one_class and not duplicate_tables(none.duplicates)


def test_one_picture_by_the_hundred_is_named_in_part(tmp_path):
    same = jpeg(1)
    path = write_split(tmp_path, "train", ("ant",), [[(f"k{i:03d}", "ant", same) for i in range(150)]])
    d = stats(StatsOptions((str(path),), processes=1)).duplicates
    assert (d.groups, d.pictures, d.one_class[0].pictures) == (1, 150, 150)
    assert keys(d.one_class[0]) == [f"k{i:03d}" for i in range(10)]


def test_processes_do_not_change_the_result(splits, found):
    two = stats(StatsOptions(paths(splits), processes=2))
    assert two.to_json() == found.to_json() | {"page": None}


def test_without_crcs_every_picture_is_read_whole(copy, found):
    """As `index` leaves the tars of others."""
    manifest = read_manifest(copy / "train.manifest.json")
    shards = []
    for record in manifest.shards:
        entries = unpack_index((copy / record.index_name).read_bytes(), Path(record.index_name))
        index = pack_index([entry._replace(crc32=0) for entry in entries], crc_known=False)
        (copy / record.index_name).write_bytes(index)
        shards.append(dataclasses.replace(record, sha256=None, index_sha256=hashlib.sha256(index).hexdigest()))
    write_manifest(dataclasses.replace(manifest, shards=tuple(shards)))
    again = of(copy)
    assert again.duplicates == found.duplicates
    assert (again.splits[0].read_whole, again.splits[1].read_whole) == (12, 0)
    assert any("12 pictures were read whole" in line for line in how_counted(again.splits, again.duplicates))


def test_a_store_s_shards_give_the_same(splits, found):
    fs = fsspec.filesystem("memory")
    for path in splits.iterdir():
        fs.pipe_file(f"/stats/{path.name}", path.read_bytes())
    urls = tuple(f"memory://stats/{Path(path).name}" for path in paths(splits))
    again = stats(StatsOptions(urls, processes=1))
    assert again.duplicates == found.duplicates
    assert [s.spreads for s in again.splits] == [s.spreads for s in found.splits]
    assert again.splits[0].read_whole == 12


def test_splits_of_one_name_are_told_apart(splits, copy):
    both = stats(StatsOptions((paths(splits)[0], paths(copy)[0]), processes=1))
    assert len({split.name for split in both.splits}) == 2
    assert both.duplicates.groups == 12 - 3  # three pictures stand twice in each; the forged ones stay apart


# ---- what is shown ----


def test_json_says_what_the_tables_say(found):
    body = json.loads(json.dumps(found.to_json()))
    tables = {table.title: table for table in summary_tables(found.splits, found.duplicates)}
    for split in body["splits"]:
        cells = next(row for row in tables["Splits"].rows if row[0] == split["name"])
        assert cells[1] == f"{split['pictures']}" and cells[3] == f"{split['shards']}"
        assert cells[6:] == (f"{sum(split['repaired'].values())}", f"{sum(split['skipped'].values())}")
        shown = next(row for row in tables["Pictures"].rows if row[:2] == ("bytes", split["name"]))
        assert shown[4] == f"{split['spreads']['bytes']['median']:,.0f}"
        sizes = [row for row in tables["Most common sizes"].rows if row[0] == split["name"]]
        assert [row[1] for row in sizes] == [f"{size['width']} x {size['height']}" for size in split["sizes"]]
        forms = {row[1]: row[2] for row in tables["Colour forms"].rows if row[0] == split["name"]}
        assert {form: f"{count}" for form, count in split["forms"].items()}.items() <= forms.items()
        assert "histograms" not in split
    counts = body["duplicates"]["counts"]
    assert [row[:2] for row in tables["Duplicates"].rows[:3]] == [(c["place"], str(c["groups"])) for c in counts]
    listed = [copy["key"] for group in body["duplicates"]["two_classes"] for copy in group["copies"]]
    assert [row[3] for row in duplicate_tables(found.duplicates)[0].rows] == listed


def test_text_shows_names_as_they_are_and_sends_a_terminal_nothing(found):
    text = found.text()
    assert "[bold]" in text and "\x1b" not in text
    assert "Same picture, two classes or more" in text and "Formicidae" in text
    assert text.splitlines()[-1] == f"page: {found.page}"


class Page(HTMLParser):
    """Tags that are closed in order, and the text between them."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_escaped_and_needs_no_network(splits, found):
    text = (splits / "stats.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.seen]
    assert tags.count("title") == 1 and "script" not in tags and "\x1b" not in text
    assert any(HOSTILE.replace("\x1b", "�") in data for data in page.texts)
    sources = [attributes["src"] for tag, attributes in page.seen if tag == "img"]
    assert len(sources) == 5 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"(href|src)=\"(?!data:)|url\(|@import", text)
    words = " ".join(page.texts)
    for table in (*summary_tables(found.splits, found.duplicates), *duplicate_tables(found.duplicates)):
        assert table.title in words
        assert all(cell in page.texts for row in table.rows for cell in row if cell)


def test_one_picture_makes_a_page_too(tmp_path):
    path = write_split(tmp_path, "_$a_$", ("ant",), [[("k", "ant", jpeg(1, 1, 1))]])
    found = stats(StatsOptions((str(path),), output=tmp_path / "one.html", processes=1))
    assert found.duplicates.groups == 0 and "no picture" not in found.text()
    Page((tmp_path / "one.html").read_text())


def test_the_command_prints_json_and_nothing_else(splits, found, command):
    done = command("data_prep", "stats", *paths(splits), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(found.to_json())) | {"page": None}


# ---- errors ----


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_damaged_shards_are_named_with_the_mend(copy):
    tar, index = copy / "train-000001.tar", copy / "train-000001.idx"
    good, good_index = tar.read_bytes(), index.read_bytes()
    entry = unpack_index(good_index, index)[4]
    mend = r".*python -m data_prep verify .*train\.manifest\.json"
    tar.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=r"train-000001\.tar has [\d,]+ bytes" + mend):
        of(copy)
    tar.write_bytes(good)
    flip(tar, entry.offset)
    with pytest.raises(ValueError, match=r"train-000001\.tar: sample progressive: is not a picture" + mend):
        of(copy)
    tar.write_bytes(good)
    flip(tar, 0)  # in a name
    with pytest.raises(ValueError, match=r"train-000001\.tar.*checksum" + mend):
        of(copy)
    tar.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001\.tar is missing" + mend):
        of(copy)
    tar.write_bytes(good)
    flip(index, 50)
    with pytest.raises(ValueError, match=r"train-000001\.idx is not the index" + mend):
        of(copy)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001\.idx is missing" + mend):
        of(copy)


def test_what_cannot_be_described_is_refused(splits, tmp_path):
    train = paths(splits)[0]
    with pytest.raises(ValueError, match="named twice"):
        stats(StatsOptions((train, train)))
    with pytest.raises(FileNotFoundError, match="no manifest"):
        stats(StatsOptions((str(tmp_path / "no.manifest.json"),)))
    with pytest.raises(ValueError, match="folder"):
        stats(StatsOptions((train,), output=tmp_path))
    with pytest.raises(ValueError, match=r"\.html"):
        stats(StatsOptions((train,), output=tmp_path / "x.png"))
    with pytest.raises(ValueError, match="no folder"):
        stats(StatsOptions((train,), output=tmp_path / "no" / "x.html"))
    with pytest.raises(ValueError, match=r"name one \*\.manifest\.json"):
        StatsOptions(())
    beton = BetonRecord("train.beton", 1, 1, "", "", "jpg", None, None)
    alone = write_manifest(Manifest("train", ("ant",), (1,), (), {}, {}, beton=beton, folder=tmp_path))
    with pytest.raises(ValueError, match=r"only a \.beton"):
        stats(StatsOptions((str(alone),)))
