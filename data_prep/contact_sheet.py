"""One PNG of a shard's pictures with their labels, so that a person can see what a run will be trained on."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from isal.isal_zlib import crc32
from PIL import Image, ImageDraw, ImageFont

from data_prep.images import PictureError, decode_rgb
from data_prep.keys import picture_keys, printable
from data_prep.manifest import (
    MANIFEST_SUFFIX,
    BetonRecord,
    IndexEntry,
    Manifest,
    ShardRecord,
    atomic_file,
    check_index,
    read_manifest,
)
from data_prep.tar_shards import read_index

MAX_COUNT = 1000  # a sheet of 5,800 x 7,600 pixels; viewers fail at much larger ones
MIN_COLUMNS = 8
BOX = 168  # pixels, of a picture's longer side
GAP = 14
LINE = 17
FONT_SIZE = 13
BACK, TEXT, SOFT, FRAME = "#ffffff", "#24292f", "#57606a", "#d8dee4"
DAMAGED, ON_DAMAGED = "#b3261e", "#ffffff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class InspectOptions:
    """Draw the pictures of one shard, with their classes and keys, as a contact sheet."""

    shard: tyro.conf.Positional[Path]
    """A .tar or .beton. Its manifest and index lie beside it."""
    output: Path | None = None
    """The PNG to write. By default it is called as the shard is, and lies in the current folder."""
    count: int = 64
    """Pictures on the sheet."""
    first: int = 0
    """Number of the first one in the shard, from 0."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_COUNT:
            raise ValueError(f"--count {self.count}: must be 1 to {MAX_COUNT}; more fit on further sheets (--first)")
        if self.first < 0:
            raise ValueError(f"--first {self.first}: must be 0 or more")


@dataclass(frozen=True)
class Sheet:
    """The contact sheet that was written."""

    path: Path
    pictures: int
    damaged: int  # of the pictures: shown as red tiles with the reason

    def to_json(self) -> dict[str, Any]:
        return {"sheet": str(self.path), "pictures": self.pictures, "damaged": self.damaged}

    def line(self) -> str:
        damaged = f"{self.damaged} of them damaged (red)" if self.damaged else "none damaged"
        return f"{self.pictures} pictures, {damaged}: {self.path}"


class _Tile(NamedTuple):
    picture: Image.Image | None  # at most BOX pixels a side; None: damaged
    reason: str  # of the damage
    names: tuple[str, ...]  # of its class, the readable one last
    key: str


def inspect(options: InspectOptions) -> Sheet:
    """Writes the sheet. A damaged picture is shown as such and is no error.

    Errors: ValueError or OSError naming the file and the mend, where there is no index or nothing to show.
    """
    if not options.shard.is_file():
        raise FileNotFoundError(f"{options.shard} is missing: name a .tar or .beton that `shard` or `beton` wrote")
    output = options.output if options.output is not None else Path(f"{options.shard.stem}.png")
    _check_output(output)
    manifest = _manifest_of(options.shard)
    record = _record(manifest, options.shard)
    if isinstance(record, BetonRecord):
        tiles = list(_beton_tiles(options, manifest))
    else:
        tiles = list(_tar_tiles(options, record, manifest))
    title = (
        f"{options.shard.name}: samples {options.first:,} to {options.first + len(tiles) - 1:,} of {record.samples:,}"
        f"  ({manifest.split}, {len(manifest.classes):,} classes)"
    )
    image = _drawn(title, tiles)
    with atomic_file(output) as file:
        image.save(file, "PNG")
    return Sheet(output, len(tiles), sum(tile.picture is None for tile in tiles))


def _check_output(output: Path) -> None:
    """Errors: ValueError, before any work is done."""
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a .png file")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}: make it first")
    if output.exists():
        with open(output, "rb") as file:
            if file.read(len(_PNG_MAGIC)) != _PNG_MAGIC:
                raise ValueError(f"--output {output} exists and is no PNG, so it is not overwritten: name another file")


def _manifest_of(shard: Path) -> Manifest:
    """The manifest beside a shard that names it."""
    broken: Exception | None = None
    for path in sorted(shard.parent.glob(f"*{MANIFEST_SUFFIX}")):
        try:
            manifest = read_manifest(path)
        except ValueError as error:
            broken = broken or error
            continue
        if any(record.name == shard.name for record in _records(manifest)):
            return manifest
    if broken is not None:
        raise ValueError(f"no manifest that can be read beside {shard} names it: {broken}") from broken
    raise ValueError(
        f"no *{MANIFEST_SUFFIX} beside {shard} names it: make one, and the index, with `python -m data_prep index`"
    )


def _records(manifest: Manifest) -> list[ShardRecord | BetonRecord]:
    return [*manifest.shards, *([] if manifest.beton is None else [manifest.beton])]


def _record(manifest: Manifest, shard: Path) -> ShardRecord | BetonRecord:
    return next(record for record in _records(manifest) if record.name == shard.name)


def _chosen(options: InspectOptions, samples: int) -> range:
    if options.first >= samples:
        raise ValueError(f"--first {options.first}: {options.shard} has {samples} samples, numbered from 0")
    return range(options.first, min(samples, options.first + options.count))


def _tar_tiles(options: InspectOptions, record: ShardRecord, manifest: Manifest) -> Iterator[_Tile]:
    tar = options.shard
    entries = read_index(tar.parent, record)
    index = tar.parent / record.index_name
    _, crc_known = check_index(index.read_bytes(), index)
    chosen = [entries[number] for number in _chosen(options, len(entries))]
    try:
        keys = picture_keys(tar, (entry.offset for entry in chosen))
    except ValueError:  # a damaged header: the pictures are where the index says all the same
        keys = {}
    with open(tar, "rb") as file:
        for entry in chosen:
            picture, reason = None, ""
            try:
                picture = _thumbnail(Image.fromarray(decode_rgb(_checked_bytes(file.fileno(), entry, crc_known))))
            except PictureError as error:
                reason = str(error)
            yield _tile(picture, reason, entry.label, keys.get(entry.offset, f"byte {entry.offset:,}"), manifest)


def _checked_bytes(descriptor: int, entry: IndexEntry, crc_known: bool) -> bytes:
    """Errors: PictureError with what is wrong with them."""
    data = os.pread(descriptor, entry.size, entry.offset)
    if len(data) != entry.size:
        raise PictureError("lies behind the end of the file, which is cut")
    if crc_known and crc32(data) != entry.crc32:
        raise PictureError("its CRC is not what the index says")
    return data


def _beton_tiles(options: InspectOptions, manifest: Manifest) -> Iterator[_Tile]:
    from data_prep.beton_reader import BetonReader  # ffcv: seconds

    reader = BetonReader(options.shard)
    for number in _chosen(options, len(reader)):
        picture, reason = None, ""
        try:
            picture = _thumbnail(Image.fromarray(reader.picture(number)))
        except ValueError as error:
            reason = str(error).removeprefix(f"{options.shard}: ")
        yield _tile(picture, reason, int(reader.labels[number]), f"sample {number}", manifest)


def _tile(picture: Image.Image | None, reason: str, label: int, key: str, manifest: Manifest) -> _Tile:
    if not 0 <= label < len(manifest.classes):
        return _Tile(None, f"label {label}, but there are {len(manifest.classes)} classes", (), key)
    names = (manifest.classes[label], *manifest.class_names[label : label + 1])
    return _Tile(picture, reason, names, key)


def _thumbnail(image: Image.Image) -> Image.Image:
    """The picture with its longer side at most BOX; a small one is enlarged by a whole number, its pixels sharp."""
    factor = BOX // max(image.size)
    if factor >= 2:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((BOX, BOX))
    return image


def _drawn(title: str, tiles: list[_Tile]) -> Image.Image:
    import matplotlib  # its letters: Pillow's own lack Greek, Cyrillic and most accents

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    plain, bold = (ImageFont.truetype(fonts / name, FONT_SIZE) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))
    columns = min(len(tiles), max(MIN_COLUMNS, math.ceil(math.sqrt(len(tiles)))))
    lines = 1 + max(len(tile.names) for tile in tiles)
    step, row = BOX + GAP, BOX + GAP + 4 + lines * LINE
    top = 2 * GAP + LINE
    width = max(columns * step + GAP, math.ceil(bold.getlength(title)) + 2 * GAP)
    image = Image.new("RGB", (width, top + math.ceil(len(tiles) / columns) * row), BACK)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, TEXT, bold)
    for number, tile in enumerate(tiles):
        x, y = GAP + number % columns * step, top + number // columns * row
        _draw_picture(image, draw, (x, y), tile, plain)
        y += BOX + 4
        for place, name in enumerate(tile.names):
            draw.text((x, y), _shortened(name, plain if place else bold), TEXT, plain if place else bold)
            y += LINE
        draw.text((x, y), _shortened(tile.key, plain, middle=True), SOFT, plain)
    return image


def _draw_picture(
    image: Image.Image, draw: ImageDraw.ImageDraw, place: tuple[int, int], tile: _Tile, font: ImageFont.FreeTypeFont
) -> None:
    x, y = place
    corners = (x, y, x + BOX - 1, y + BOX - 1)
    if tile.picture is None:
        draw.rectangle(corners, DAMAGED)
        letters = int(BOX / font.getlength("n")) - 2
        text = "\n".join(textwrap.wrap(printable(f"damaged: {tile.reason}"), letters)[: (BOX - 12) // LINE])
        draw.multiline_text((x + 8, y + 6), text, ON_DAMAGED, font)
        return
    draw.rectangle(corners, outline=FRAME)
    image.paste(tile.picture, (x + (BOX - tile.picture.width) // 2, y + (BOX - tile.picture.height) // 2))


def _shortened(text: str, font: ImageFont.FreeTypeFont, middle: bool = False) -> str:
    """The text if it is no wider than a picture's box; else with an ellipsis at its end, or in its middle."""
    text = shown = printable(text)
    kept = min(len(text), BOX)  # no letter is narrower than a pixel
    while font.getlength(shown) > BOX:
        kept -= 1
        tail = kept // 2 if middle else 0
        shown = f"{text[: kept - tail].rstrip(' ,')}…{text[len(text) - tail :]}"
    return shown
