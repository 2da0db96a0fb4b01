"""A crop of a JPEG with restart markers is decoded from the segments under it alone, to the pixels of a full decode."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from pipeline.data import native
from tests.unit.test_loader_native_pixels import jpeg, needs_library

pytestmark = needs_library
SAMPLINGS = {
    "4:2:0": ({"subsampling": "4:2:0"}, 16, 16),
    "4:2:2": ({"subsampling": "4:2:2"}, 16, 8),
    "4:4:4": ({"subsampling": "4:4:4"}, 8, 8),
    "grey": ({"mode": "L"}, 8, 8),
    "RGB": ({"keep_rgb": True, "subsampling": "4:4:4"}, 8, 8),
}
Window = tuple[int, int, int, int]


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def window(draw: random.Random, width: int, height: int) -> Window:
    left, top = draw.randrange(width), draw.randrange(height)
    return left, top, draw.randint(1, width - left), draw.randint(1, height - top)


def check(data: bytes, whole: np.ndarray, box: Window) -> bool:
    """Whether segments were left out; the pixels are those of the whole."""
    left, top, width, height = box
    status, part, spliced = native.decode_window(data, box)
    assert status == native.OK
    assert np.array_equal(part, whole[top : top + height, left : left + width]), box
    return spliced


def interval_for(width: int, mcu_width: int, draw: random.Random) -> int:
    """MCUs between markers: a divisor of a row, or some rows."""
    columns = -(-width // mcu_width)
    return draw.choice([n for n in range(1, columns + 1) if columns % n == 0] + [2 * columns, 3 * columns])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_windows_of_pictures_of_any_size(sampling):
    draw, spliced = random.Random(sampling), 0
    options, mcu_width, _ = SAMPLINGS[sampling]
    for number in range(60):
        width, height = draw.randint(1, 170), draw.randint(1, 170)
        interval = interval_for(width, mcu_width, draw)
        data = jpeg(width, height, number, restart_marker_blocks=interval, optimize=number % 2 == 0, **options)
        whole = decoded(data)
        spliced += sum(check(data, whole, window(draw, width, height)) for _ in range(10))
    assert spliced > 200


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_edge_of_a_segment(sampling):
    """One pixel to either side of it: a chroma sample of the neighbour counts there."""
    options, mcu_width, mcu_height = SAMPLINGS[sampling]
    width, height = 6 * mcu_width + 3, 5 * mcu_height + 3
    data = jpeg(width, height, restart_marker_blocks=1, **options)
    whole = decoded(data)
    edges = [2 * mcu_width + i for i in (-2, -1, 0, 1, 2)]
    for left in edges:
        for right in (left + 1, 4 * mcu_width - 1, 4 * mcu_width, 4 * mcu_width + 1, width - 3, width - 1, width):
            for top, bottom in ((2 * mcu_height - 1, 3 * mcu_height), (2 * mcu_height, 3 * mcu_height + 1)):
                assert check(data, whole, (left, top, right - left, bottom - top))
    for left in range(width - 6, width):  # the last MCU is three pixels wide
        check(data, whole, (left, 0, width - left, height))


def test_fewer_bytes_are_decoded():
    """A segment far from the window may hold anything: it is never looked into."""
    data = bytearray(jpeg(320, 320, restart_marker_blocks=1))
    whole = decoded(bytes(data))
    begin, end = markers(bytes(data))[-2:]
    data[begin + 2 : end] = bytes(end - begin - 2)
    assert not np.array_equal(decoded(bytes(data)), whole)
    assert check(bytes(data), whole, (0, 0, 64, 64))


def markers(data: bytes) -> list[int]:
    """Where each restart marker stands."""
    first = data.index(b"\xff\xda")
    return [i for i in range(first, len(data) - 1) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]


def without(data: bytes, number: int) -> bytes:
    at = markers(data)[number]
    return data[:at] + data[at + 2 :]


def doubled(data: bytes, number: int) -> bytes:
    at = markers(data)[number]
    return data[:at] + data[at : at + 2] + data[at:]


def renumbered(data: bytes, number: int) -> bytes:
    at = markers(data)[number]
    return data[: at + 1] + bytes([0xD0 + (data[at + 1] - 0xD0 + 3) % 8]) + data[at + 2 :]


def shortened(data: bytes, number: int) -> bytes:
    begin, end = markers(data)[number : number + 2]
    return data[:begin] + data[end:]


def filled(data: bytes, number: int) -> bytes:
    """A marker may be preceded by any number of FF bytes."""
    at = markers(data)[number]
    return data[:at] + b"\xff\xff" + data[at:]


@pytest.mark.parametrize("damage", [without, doubled, renumbered, shortened, filled])
def test_markers_that_are_not_as_they_must_be_are_never_trusted(damage):
    data = jpeg(160, 130, restart_marker_blocks=2)
    for number in (0, 5, 17, len(markers(data)) - 2):
        bad = damage(data, number)
        whole = decoded(bad)
        for box in ((0, 0, 40, 40), (80, 64, 40, 40), (100, 90, 60, 40)):
            left, top, width, height = box
            status, part, spared = native.decode_window(bad, box)
            assert not (number == 0 and spared)  # what comes behind the window is not looked at
            if status == native.OK:
                assert np.array_equal(part, whole[top : top + height, left : left + width])
            else:
                assert status == native.ASK_REFERENCE


@pytest.mark.parametrize("interval", [3, 7, 9, 11, 25])
def test_an_interval_that_fits_no_row(interval):
    """Segments that end in the middle of one row and begin in another's, here of 10 MCUs."""
    data = jpeg(160, 130, restart_marker_blocks=interval)
    whole, draw, spared = decoded(data), random.Random(interval), 0
    for _ in range(60):
        spared += check(data, whole, window(draw, 160, 130))
    assert spared > 10


def test_bytes_behind_the_end_and_segments_before_the_frame_change_nothing():
    data = jpeg(160, 130, restart_marker_blocks=2, comment=b"x" * 5000, icc_profile=b"y" * 3000, exif=b"Exif\0\0")
    whole = decoded(data)
    assert check(data + b"\xff\xd3 trailing", whole, (64, 64, 20, 20))


def test_progressive_files_are_decoded_whole():
    data = jpeg(160, 130, restart_marker_blocks=2, progressive=True)
    assert not check(data, decoded(data), (64, 64, 20, 20))


def test_real_pictures_with_markers(imagenet_sample):
    draw, spliced = random.Random(0), 0
    for path in sorted(imagenet_sample.glob("*/*.JPEG"))[::5]:
        image = Image.open(path)
        buffer = io.BytesIO()
        columns = -(-image.width // 16)
        interval = max(n for n in (4, 3, 2, 1) if columns % n == 0)
        image.convert("RGB").save(buffer, "JPEG", quality=90, restart_marker_blocks=interval)
        whole = decoded(buffer.getvalue())
        spliced += sum(check(buffer.getvalue(), whole, window(draw, *image.size)) for _ in range(3))
    assert spliced > 100
