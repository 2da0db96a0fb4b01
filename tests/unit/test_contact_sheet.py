"""`inspect`: what is on the sheet, where, and what it does with damage. The labels' look was judged by eye."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from data_prep import contact_sheet
from data_prep.contact_sheet import BOX, GAP, MIN_COLUMNS, InspectOptions, inspect
from data_prep.images import decode_rgb
from data_prep.manifest import Manifest, pack_index, read_manifest, unpack_index, write_manifest
from data_prep.storage import LocalFolder
from data_prep.tar_shards import read_index, write_tar

RED = (0xB3, 0x26, 0x1E)


@dataclasses.dataclass(frozen=True)
class Sample:
    key: str
    label: int


@pytest.fixture
def names(monkeypatch) -> list[contact_sheet._Tile]:
    """The tiles of each sheet that is drawn."""
    drawn: list[contact_sheet._Tile] = []
    draw = contact_sheet._drawn
    monkeypatch.setattr(contact_sheet, "_drawn", lambda title, tiles: drawn.extend(tiles) or draw(title, tiles))
    return drawn


def sheet_of(shard: Path, output: Path, **options):
    return inspect(InspectOptions(shard, output=output, **options))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def tile(sheet: np.ndarray, number: int, lines: int, columns: int = MIN_COLUMNS) -> np.ndarray:
    """The box of a picture."""
    row = BOX + GAP + 4 + lines * contact_sheet.LINE
    x, y = GAP + number % columns * (BOX + GAP), 2 * GAP + contact_sheet.LINE + number // columns * row
    return sheet[y : y + BOX, x : x + BOX]


def test_pictures_stand_in_order_over_their_class_and_key(copy, tmp_path, names):
    manifest = read_manifest(copy / "train.manifest.json")
    write_manifest(dataclasses.replace(manifest, class_names=("Formicidae", "Apis", "Felis")))
    sheet = sheet_of(copy / "train-000001.tar", tmp_path / "sheet.png")
    assert (sheet.path, sheet.pictures, sheet.damaged) == (tmp_path / "sheet.png", 7, 0)
    shown = pixels(sheet.path)
    entries = read_index(copy, manifest.shards[1])
    readable = dict(zip(manifest.classes, ("Formicidae", "Apis", "Felis"), strict=True))
    tar = (copy / "train-000001.tar").read_bytes()
    for number, (entry, drawn) in enumerate(zip(entries, names, strict=True)):
        name = manifest.classes[entry.label]
        assert drawn.names == (name, readable[name]) and drawn.key.startswith(f"{name}_")
        picture = decode_rgb(tar[entry.offset : entry.offset + entry.size])
        height, width, _ = picture.shape
        factor = BOX // max(width, height)  # the pictures are small: each pixel is a square
        top, left = (BOX - height * factor) // 2, (BOX - width * factor) // 2
        box = tile(shown, number, lines=3, columns=7)
        middle = box[top : top + height * factor : factor, left : left + width * factor : factor]
        np.testing.assert_array_equal(middle, picture)


def test_count_and_first_choose_the_pictures(shards, tmp_path, names):
    sheet = sheet_of(shards / "train-000000.tar", tmp_path / "a.png", first=2, count=3)
    everything = len(names)
    assert sheet.pictures == everything == 3
    sheet_of(shards / "train-000000.tar", tmp_path / "b.png")
    assert [t.key for t in names[3 + 2 : 3 + 5]] == [t.key for t in names[:3]] and len(names) == 3 + 7
    assert pixels(tmp_path / "b.png").shape[1] > pixels(tmp_path / "a.png").shape[1]
    with pytest.raises(ValueError, match=r"--first 7: .*has 7 samples"):
        sheet_of(shards / "train-000000.tar", tmp_path / "c.png", first=7)
    for wrong in ({"count": 0}, {"count": 1001}, {"first": -1}):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong))}"):
            InspectOptions(shards / "train-000000.tar", **wrong)


def test_large_and_long_pictures_keep_their_shape(tmp_path):
    sizes = [(1000, 500), (50, 2000), (169, 169), (84, 10)]
    wanted = [(168, 84), (4, 168), (168, 168), (168, 20)]
    for size, (width, height) in zip(sizes, wanted, strict=True):
        assert contact_sheet._thumbnail(Image.new("RGB", size)).size == (width, height)


def test_names_too_long_are_shortened_and_others_kept():
    font = ImageFont.load_default(size=13)
    long = "n01440764_a_very_long_file_name_of_a_picture_10026"
    middle, end = (contact_sheet._shortened(long, font, middle=m) for m in (True, False))
    assert middle.startswith("n014") and middle.endswith("10026") and "…" in middle
    assert end.startswith(long[:10]) and end.endswith("…")
    assert max(font.getlength(text) for text in (middle, end)) <= BOX
    assert contact_sheet._shortened("great white shark", font) == "great white shark"
    assert contact_sheet._shortened("two\nlines\x1b", font) == "two�lines�"
    assert contact_sheet._shortened("", font) == ""


def test_damaged_pictures_are_red_and_counted(copy, tmp_path, names):
    tar = copy / "train-000000.tar"
    entries = read_index(copy, read_manifest(copy / "train.manifest.json").shards[0])
    data = bytearray(tar.read_bytes())
    data[entries[2].offset + entries[2].size // 2] ^= 0x10
    tar.write_bytes(data[: entries[5].offset + 10])  # a flipped bit, and a cut
    sheet = sheet_of(tar, tmp_path / "sheet.png")
    assert (sheet.pictures, sheet.damaged) == (7, 3)
    assert "3 of them damaged" in sheet.line() and sheet.to_json()["damaged"] == 3
    assert [t.reason for t in names if t.picture is None] == [
        "its CRC is not what the index says",
        *["lies behind the end of the file, which is cut"] * 2,
    ]
    shown = pixels(sheet.path)
    red = [(tile(shown, number, lines=2, columns=7) == RED).all(2).mean() > 0.5 for number in range(7)]
    assert red == [False, False, True, False, False, True, True]
    assert names[2].key.startswith("byte ")  # of a cut tar no name is trusted


def test_a_picture_that_is_none_and_a_wrong_label_are_damage_too(tmp_path, names):
    record = write_tar(LocalFolder(tmp_path), "train-000000.tar", [(Sample("k", 0), b"no"), (Sample("l", 5), b"no")])
    write_manifest(Manifest("train", ("ant",), (2,), (record,), {}, {}, folder=tmp_path))
    assert sheet_of(tmp_path / "train-000000.tar", tmp_path / "sheet.png").damaged == 2
    assert [t.reason for t in names] == ["is not a picture", "label 5, but there are 1 classes"]
    assert [t.key for t in names] == ["k", "l"]


def test_a_foreign_tar_without_crcs_is_shown(copy, tmp_path):
    manifest = read_manifest(copy / "train.manifest.json")
    record = manifest.shards[0]
    entries = unpack_index((copy / record.index_name).read_bytes(), Path(record.index_name))
    index = pack_index([entry._replace(crc32=0) for entry in entries], crc_known=False)
    (copy / record.index_name).write_bytes(index)
    record = dataclasses.replace(record, sha256=None, index_sha256=hashlib.sha256(index).hexdigest())
    write_manifest(dataclasses.replace(manifest, shards=(record, *manifest.shards[1:])))
    assert sheet_of(copy / record.name, tmp_path / "sheet.png").damaged == 0


def test_a_shard_that_no_manifest_names_gets_the_mend(shards, copy, tmp_path):
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(shards / "train-000000.tar", lone)
    with pytest.raises(ValueError, match="python -m data_prep index"):
        sheet_of(lone / "train-000000.tar", tmp_path / "sheet.png")
    with pytest.raises(FileNotFoundError, match=r"train-000009\.tar is missing"):
        sheet_of(copy / "train-000009.tar", tmp_path / "sheet.png")
    (copy / "train.manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not a manifest"):
        sheet_of(copy / "train-000000.tar", tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


def test_what_is_no_png_is_not_overwritten(shards, tmp_path, monkeypatch):
    tar = shards / "train-000000.tar"
    notes = tmp_path / "notes.png"
    notes.write_text("mine")
    with pytest.raises(ValueError, match="is no PNG"):
        sheet_of(tar, notes)
    assert notes.read_text() == "mine"
    for wrong, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.png", "there is no folder")):
        with pytest.raises(ValueError, match=words):
            sheet_of(tar, wrong)
    monkeypatch.chdir(tmp_path)
    assert inspect(InspectOptions(tar)).path == Path("train-000000.png")
    before = (tmp_path / "train-000000.png").read_bytes()
    inspect(InspectOptions(tar))  # its own earlier sheet is
    assert (tmp_path / "train-000000.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.png", "train-000000.png"]


def test_the_command_says_what_it_wrote(shards, tmp_path, command):
    words = ("data_prep", "inspect", str(shards / "train-000003.tar"), "--output", str(tmp_path / "a.png"), "--json")
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"sheet": str(tmp_path / "a.png"), "pictures": 3, "damaged": 0}


@pytest.mark.parametrize("split", ["jpg_split", "raw_split"])
def test_a_beton_shows_the_pictures_of_its_shards(split, request, tmp_path, names):
    manifest = read_manifest(request.getfixturevalue(split))
    sheet = sheet_of(manifest.folder / manifest.beton.name, tmp_path / "beton.png", first=3, count=5)
    assert (sheet.pictures, sheet.damaged) == (5, 0)
    entries = [entry for record in manifest.shards for entry in read_index(manifest.folder, record)][3:8]
    assert [t.names[0] for t in names] == [manifest.classes[entry.label] for entry in entries]
    assert [t.key for t in names] == [f"sample {number}" for number in range(3, 8)]
    tar = (manifest.folder / manifest.shards[0].name).read_bytes()
    for entry, shown in zip(entries[:4], names, strict=False):
        picture = Image.fromarray(decode_rgb(tar[entry.offset : entry.offset + entry.size]))
        expected = np.asarray(contact_sheet._thumbnail(picture)).astype(int)
        assert np.abs(np.asarray(shown.picture) - expected).mean() < 3  # another decoder's rounding
