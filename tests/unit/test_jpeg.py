"""JPEGs judged without decoding: never called well-formed where Pillow refuses them; grey made colour, bit for bit."""

import functools
import io
import random
import struct
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep import jpeg

MARKER_BYTES = (0, 0xFF, 0xC4, 0xD9, 0xD8, 0xDA, 0xDB, 0xC0, 0xC1, 0xC2, 0xC9, 0xDD, 1, 2, 3, 4, 0x10, 0x11, 0x41)


def encoded(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def colours() -> np.ndarray:
    """uint8 (40, 56, 3), smooth with a little noise."""
    y, x = np.mgrid[0:40, 0:56]
    smooth = np.stack([x * 4, y * 5, 255 - x * 2 - y], axis=-1)
    return (smooth + np.random.RandomState(0).randint(0, 20, smooth.shape)).clip(0, 255).astype(np.uint8)


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    """A segment put right behind the start marker."""
    return data[:2] + struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body + data[2:]


def segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end) of each segment up to the first scan's, whose data follow it."""
    found, position = [], 2
    while not found or found[-1][0] != 0xDA:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        found.append((data[position + 1], position, end))
        position = end
    return found


@functools.cache
def exif_with_thumbnail() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    return exif.tobytes() + encoded(colours()[:16, :16])


@functools.cache
def sound() -> tuple[bytes, ...]:
    """JPEGs of all common kinds."""
    kinds: list[dict] = [
        {"subsampling": 0},
        {"subsampling": 2, "optimize": True},
        {"restart_marker_blocks": 2},
        {"exif": exif_with_thumbnail()},
        {"icc_profile": b"x" * 3000, "comment": b"hello"},
    ]
    found = []
    for kind in kinds:
        for progressive in (False, True):
            found.append(encoded(colours(), progressive=progressive, **kind))
            grey = {name: value for name, value in kind.items() if name != "subsampling"}
            found.append(encoded(colours()[..., 0], progressive=progressive, **grey))
    found.append(with_segment(found[0], 0xEE, b"Adobe\0d\0\0\0\0\1"))
    found.append(with_segment(found[0], 0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\4abcd"))
    scans = jpeg.grey_to_rgb(found[1])  # several scans in a baseline frame
    assert scans is not None
    return (*found, scans)


def pillow_size(data: bytes) -> tuple[int, int] | None:
    """The size where Pillow loads all of it, None where it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                image.load()
                return image.size
        except Exception:
            return None


def test_sound_jpegs_are_recognised_whatever_follows_them():
    for data in sound():
        for tail in (b"", b"trailing bytes", b"\0" * 3, b"\xff\xd8\xff\xda"):
            header = jpeg.well_formed(data + tail)
            assert header is not None and (header.width, header.height) == (56, 40) == pillow_size(data + tail)


def test_header_of_the_first_bytes():
    for data in sound():
        header = jpeg.well_formed(data)
        frame = next(end for marker, _, end in segments(data) if marker in jpeg.ALL_FRAMES)
        assert jpeg.jpeg_header(data[:frame]) == jpeg.jpeg_header(data) == header
        assert jpeg.jpeg_header(data[: frame - 1]) is None
        with Image.open(io.BytesIO(data)) as image:
            assert len(header.components) == len(image.getbands())
            assert (header.frame == 0xC2) == bool(image.info.get("progressive"))
            assert bool(header.exif) == ("exif" in image.info)
    assert jpeg.jpeg_header(b"") is jpeg.jpeg_header(b"\xff\xd8\xff") is jpeg.jpeg_header(b"\x89PNG") is None


def _cut(data, rng):
    return data[: rng.randrange(len(data))]


def _cut_and_filled(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + rng.choice([bytes(len(data) - place), b"\xff\xd9"])


def _header_flipped(data, rng):
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        changed[rng.randrange(2, segments(data)[-1][2])] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _header_overwritten(data, rng):
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        changed[rng.randrange(2, segments(data)[-1][2])] = rng.choice(MARKER_BYTES)
    return bytes(changed)


def _marker_in_scan(data, rng):
    place = rng.randrange(segments(data)[-1][2], len(data) - 2)
    return data[:place] + bytes((0xFF, rng.choice(MARKER_BYTES))) + data[place + 2 :]


def _deleted(data, rng):
    place = rng.randrange(2, len(data))
    return data[:place] + data[place + rng.choice((1, 2, 5, 30, 200)) :]


def _inserted(data, rng):
    place = rng.randrange(2, len(data))
    return data[:place] + bytes(rng.choice(MARKER_BYTES) for _ in range(rng.choice((1, 2, 5)))) + data[place:]


def _swapped(data, rng):
    (_, a, b), (_, c, d) = sorted(rng.sample(segments(data), 2), key=lambda segment: segment[1])
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _dropped(data, rng):
    _, start, end = rng.choice(segments(data))
    return data[:start] + data[end:]


def _doubled(data, rng):
    _, start, end = rng.choice(segments(data))
    place = rng.choice(segments(data))[1]
    return data[:place] + data[start:end] + data[place:]


def _spliced(data, rng):
    other = rng.choice(sound())
    return data[: rng.choice(segments(data))[1]] + other[rng.choice(segments(other))[1] :]


def _tables_overwritten(data, rng):
    _, start, end = rng.choice([s for s in segments(data) if s[0] in (0xC0, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD)])
    place = rng.randrange(start + 4, end)
    return data[:place] + bytes((rng.choice((*MARKER_BYTES, data[place] ^ 1, data[place] ^ 16)),)) + data[place + 1 :]


def _odd_size(data, rng):
    _, start, _ = next(s for s in segments(data) if s[0] in (0xC0, 0xC2))
    size = struct.pack(">HH", rng.choice((0, 1, 41, 300)), rng.choice((0, 1, 57, 300)))
    return data[: start + 5] + size + data[start + 9 :]


def _short_application_segment(data, rng):
    marker, whole = rng.choice(
        [
            (0xE0, b"JFIF\0\1\1\0"),
            (0xEE, b"Adobe\0d\0\0\0\0\1"),
            (0xE2, b"ICC_PROFILE\0\1\1z"),
            (0xE2, b"MPF\0II*\0\x08\0\0\0"),
            (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\4abcd"),
            (0xE1, exif_with_thumbnail()[:80]),
        ]
    )
    return with_segment(data, marker, whole[: rng.randrange(len(whole))])


DAMAGES = (
    _cut,
    _cut_and_filled,
    _header_flipped,
    _header_overwritten,
    _marker_in_scan,
    _deleted,
    _inserted,
    _swapped,
    _dropped,
    _doubled,
    _spliced,
    _tables_overwritten,
    _odd_size,
    _short_application_segment,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_nothing_that_pillow_refuses_is_called_well_formed(damage):
    rng = random.Random(damage.__name__)
    for number in range(100):
        data = damage(sound()[number % len(sound())], rng)
        header = jpeg.well_formed(data)
        if header is not None and header.width * header.height < 10_000_000:
            if not all(jpeg.exif_is_sound(data, span) for span in header.exif):
                data = jpeg.without_segments(data, header.exif)
            assert pillow_size(data) == (header.width, header.height), (number, data.hex())


def test_every_cut_is_in_doubt():
    for data in (encoded(colours()[:8, :8]), encoded(colours()[:8, :8], progressive=True)):
        assert jpeg.well_formed(data) is not None
        assert not any(jpeg.well_formed(data[:length]) for length in range(len(data)))


def test_what_libjpeg_refuses_is_in_doubt():
    data = encoded(colours(), subsampling=0)
    (frame,) = [start for marker, start, _ in segments(data) if marker == 0xC0]
    (scan,) = [(start, end) for marker, start, end in segments(data) if marker == 0xDA]
    huffman = next(start for marker, start, _ in segments(data) if marker == 0xC4)
    arithmetic = data[: frame + 1] + b"\xc9" + data[frame + 2 :]
    twelve_bits = data[: frame + 4] + b"\x0c" + data[frame + 5 :]
    fractions = data[: frame + 11] + b"\x31\2\x21" + data[frame + 14 :]  # 3x1 beside 2x1
    all_ones = data[: huffman + 5] + bytes((2, *[0] * 15)) + data[huffman + 21 :]
    two_scans = data[: scan[1]] + data[scan[0] :]
    half = with_segment(data[:2] + data[frame:], 0xFE, b"no quantization tables")
    for odd in (arithmetic, twelve_bits, fractions, all_ones, two_scans, half, data[2:], b"\xff\xd8" + data):
        assert jpeg.well_formed(odd) is None
    assert [pillow_size(odd) for odd in (fractions, all_ones, two_scans, half)] == [None] * 4


def test_exif_is_sound_only_where_pillow_reads_it_without_a_word():
    data = encoded(colours(), exif=exif_with_thumbnail())
    (span,) = jpeg.well_formed(data).exif
    assert jpeg.exif_is_sound(data, span)
    rng = random.Random(1)
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.randrange(span[0] + 10, span[0] + 80)] = rng.choice((0, 1, 9, 0x7F, 0xFF))
        if jpeg.exif_is_sound(bytes(damaged), span):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                exif = Image.Exif()
                exif.load(bytes(damaged[span[0] + 4 : span[1]]))
                dict(exif)
    assert pillow_size(jpeg.without_segments(data, (span,))) == (56, 40)
    assert jpeg.without_segments(b"0123456789", ((1, 3), (5, 6))) == b"0346789"


def rgb_of(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def assert_same_colours_everywhere(data: bytes, expected: np.ndarray) -> None:
    """Pillow and OpenCV give the expected pixels to the bit, torchvision and ffcv nearly (ffcv has a fast DCT)."""
    import ffcv.libffcv
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    np.testing.assert_array_equal(rgb_of(data), expected)
    as_stored = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), as_stored), expected)
    theirs = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    np.testing.assert_allclose(theirs.permute(1, 2, 0).numpy(), expected, atol=2)
    pixels = np.zeros(expected.shape, np.uint8)
    height, width = expected.shape[:2]
    status = ffcv.libffcv.imdecode(
        np.frombuffer(data, np.uint8), pixels, height, width, height, width, 0, 0, 1, 1, False, False
    )
    assert status == 0
    assert np.abs(pixels.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("kind", [{}, {"restart_marker_blocks": 3}, {"optimize": True}, {"quality": 100}])
@pytest.mark.parametrize("shape", [(40, 56), (1, 1), (9, 8), (17, 23)])
def test_grey_becomes_colour_bit_for_bit(kind, shape):
    data = encoded(colours()[: shape[0], : shape[1], 0], **kind)
    colour = jpeg.grey_to_rgb(data + b"trailing")
    header = jpeg.well_formed(colour)
    assert len(header.components) == 3 and len(colour) < len(data) + 120 + shape[0] * shape[1]
    assert_same_colours_everywhere(colour, rgb_of(data))


def test_grey_with_odd_headers_becomes_colour_too():
    data = encoded(colours()[..., 0])
    frame = next(start for marker, start, _ in segments(data) if marker == 0xC0)
    sampled = data[: frame + 11] + b"\x22" + data[frame + 12 :]
    for odd in (
        with_segment(data, 0xEE, b"Adobe\0d\0\0\0\0\0"),
        data[:2] + data[20:],  # without JFIF's segment
        with_segment(data[:2] + data[20:], 0xEE, b"Adobe\0d\0\0\0\0\0"),
        encoded(colours()[..., 0], exif=exif_with_thumbnail()),
        sampled,
    ):
        assert_same_colours_everywhere(jpeg.grey_to_rgb(odd), rgb_of(odd))


def test_grey_to_rgb_leaves_other_pictures_alone():
    grey = encoded(colours()[..., 0])
    for data in (encoded(colours()), encoded(colours()[..., 0], progressive=True), grey[:-30], b"", b"\x89PNG"):
        assert jpeg.grey_to_rgb(data) is None


@pytest.mark.parametrize("ids", [b"RGB", b"\1\2\3"])
def test_decoders_agree_on_rgb_without_chroma(ids):
    """RGB kept as RGB, told by Adobe's segment or by the components' names: every decoder sees the same colours."""
    data = bytearray(encoded(colours(), keep_rgb=True, quality=95))
    (frame,) = [start for marker, start, _ in segments(bytes(data)) if marker == 0xC0]
    (scan,) = [start for marker, start, _ in segments(bytes(data)) if marker == 0xDA]
    for number in range(3):
        data[frame + 10 + 3 * number] = data[scan + 5 + 2 * number] = ids[number]
    told = bytes(data)
    if ids != b"RGB":
        told = with_segment(told, 0xEE, b"Adobe\0d\0\0\0\0\0")
    assert jpeg.well_formed(told) is not None
    assert np.abs(rgb_of(told).astype(int) - colours()).mean() < 4
    assert_same_colours_everywhere(told, rgb_of(told))


def test_real_pictures_are_recognised(imagenet_sample):
    greys = 0
    for path in imagenet_sample.rglob("*.JPEG"):
        data = path.read_bytes()
        header = jpeg.well_formed(data)
        with Image.open(path) as image:
            assert header is not None and (header.width, header.height) == image.size
        assert jpeg.jpeg_header(data[: 64 << 10]) is not None
        if len(header.components) == 1:
            assert_same_colours_everywhere(jpeg.grey_to_rgb(data), rgb_of(data))
            greys += 1
    assert greys == 4
