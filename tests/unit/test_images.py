"""One picture: what passes, is repaired, reduced or refused, and that it looks then as Pillow shows the source."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep import images
from data_prep.images import PictureOptions, prepare_picture

PLAIN = PictureOptions()


def encoded(array_or_image, format="JPEG", **options) -> bytes:
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(opened(data).convert("RGB"))


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([x * 255 // width, y * 255 // height, 255 - (x + y) * 255 // (width + height)], axis=-1)
    return picture.astype(np.uint8)


@pytest.fixture
def gradient() -> np.ndarray:
    """uint8 (48, 64, 3), smooth, so that a JPEG of it stays close."""
    return smooth(48, 64)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    return exif


def test_plain_jpegs_pass_through_byte_for_byte(gradient):
    for data in (
        encoded(gradient),
        encoded(gradient, progressive=True),
        encoded(gradient, keep_rgb=True),
        encoded(gradient, restart_marker_blocks=1),
        encoded(gradient) + b"trailing bytes",
        encoded(gradient, exif=turned()),
        encoded(gradient[:1, :1]),
        encoded(smooth(1, 10_000)),
        encoded(gradient, "MPO", save_all=True, append_images=[Image.fromarray(gradient[::-1])]),
    ):
        assert prepare_picture(data, PLAIN) == (data, *opened(data).size, None, False)


def test_stray_bytes_between_markers_are_mended(gradient):
    data = encoded(gradient)
    prepared = prepare_picture(data[:20] + b"stray" + data[20:], PLAIN)
    assert prepared[1:] == (64, 48, "JPEG with stray bytes", False)
    assert np.abs(rgb(prepared.data).astype(int) - rgb(data)).mean() < 3


def test_exif_rotation_is_not_applied(gradient):
    for format in ("JPEG", "PNG"):
        data = encoded(gradient, format, exif=turned())
        assert rgb(prepare_picture(data, PLAIN).data).shape == gradient.shape
        for options in (PLAIN, PictureOptions(max_side=32)):
            prepared = prepare_picture(data, options)
            assert prepared.width > prepared.height and opened(prepared.data).size == prepared[1:3]
            assert images.reduced_rgb(data, options).shape == (prepared.height, prepared.width, 3)


def quirks(gradient):
    grey = gradient[..., 0]
    colour = Image.fromarray(gradient)
    cmyk = encoded(colour.convert("CMYK"))
    adobe = cmyk.index(b"Adobe")
    return {
        "PNG, mode RGB": encoded(gradient, "PNG"),
        "PNG, mode RGBA": encoded(np.dstack([gradient, np.full(grey.shape, 9, np.uint8)]), "PNG"),
        "PNG, mode P": encoded(colour.quantize(64), "PNG"),
        "PNG, mode 1": encoded(Image.fromarray(grey > 128), "PNG"),
        "JPEG, mode CMYK": cmyk,
        "JPEG, mode CMYK ": cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :],  # the same, told to be YCCK
        "WEBP, mode RGB": encoded(gradient, "WEBP", lossless=True),
        "BMP, mode RGB": encoded(gradient, "BMP"),
        "GIF, mode P": encoded(grey, "GIF"),
        "TIFF, mode RGB": encoded(gradient, "TIFF"),
    }


def test_quirks_become_rgb_jpegs_that_look_the_same(gradient):
    for reason, data in quirks(gradient).items():
        prepared = prepare_picture(data, PLAIN)
        assert prepared[1:] == (64, 48, reason.strip(), False)
        assert (opened(prepared.data).format, opened(prepared.data).mode) == ("JPEG", "RGB")
        assert np.abs(rgb(prepared.data).astype(int) - rgb(data)).mean() < 3, reason
        assert prepare_picture(prepared.data, PLAIN) == (prepared.data, 64, 48, None, False)


def test_sixteen_bits_keep_their_high_byte(gradient):
    prepared = prepare_picture(encoded((gradient[..., 0].astype(np.uint16) << 8) + 255, "PNG"), PLAIN)
    assert prepared.reason == "PNG, mode I;16"
    assert np.abs(rgb(prepared.data).astype(int) - gradient[..., :1]).mean() < 3


def test_grey_jpegs_become_colour(gradient):
    grey = gradient[..., 0]
    for options, largest in (({}, 0), ({"restart_marker_blocks": 3}, 0), ({"progressive": True}, 2)):
        data = encoded(grey, **options)
        prepared = prepare_picture(data, PLAIN)
        assert prepared[1:] == (64, 48, "JPEG, mode L", False) and opened(prepared.data).mode == "RGB"
        assert np.abs(rgb(prepared.data).astype(int) - rgb(data)).max() <= largest
    both = prepare_picture(encoded(grey, exif=b"Exif\0\0broken"), PLAIN)
    assert both.reason == "JPEG, mode L, broken EXIF"
    reduced = prepare_picture(encoded(grey), PictureOptions(max_side=32))
    assert reduced[1:] == (32, 24, "JPEG, mode L", True) and opened(reduced.data).mode == "RGB"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_dropped_and_nothing_else(gradient):
    whole = turned().tobytes()
    for exif in (b"Exif\0\0broken", whole[:-7], whole[:14] + b"\xff\xff" + whole[16:]):
        data = encoded(gradient, exif=exif)
        prepared = prepare_picture(data, PLAIN)
        assert prepared.reason == "JPEG, broken EXIF"
        assert b"Exif" not in prepared.data and len(prepared.data) == len(data) - len(exif) - 4
        np.testing.assert_array_equal(rgb(prepared.data), rgb(data))


def test_uncommon_frames_are_written_anew(gradient):
    data = encoded(gradient)
    frame = data.index(b"\xff\xc0")
    # The rules of Huffman-coded frames hold for C1 as for C0; Pillow cannot read the hierarchical C5.
    extended = data[: frame + 1] + b"\xc1" + data[frame + 2 :]
    assert prepare_picture(extended, PLAIN).reason is None
    with pytest.raises(images.PictureError):
        prepare_picture(data[: frame + 1] + b"\xc5" + data[frame + 2 :], PLAIN)


def _png_header(width, height) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + struct.pack(">I", 10) + b"IDAT"


def _declared(data: bytes, width: int, height: int) -> bytes:
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def test_pictures_that_cannot_be_used_are_refused(gradient):
    jpeg = encoded(gradient)
    for data, reason in [
        (b"", "empty"),
        (b"hello, I am no picture", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (jpeg[:-200], "truncated"),
        (jpeg[:-20], "truncated"),
        (encoded(gradient, "PNG")[:-60], "decoded"),
        (_png_header(9000, 9000), "81.0 megapixels"),
        (_png_header(60000, 60000), "megapixels"),
        (_declared(jpeg, 9000, 6000), "54.0 megapixels"),
        (_declared(jpeg, 65000, 65000), "megapixels"),
        (encoded(np.zeros((1, 70000, 3), np.uint8), "PNG"), "written as a JPEG"),
        (encoded(np.ones((4, 4), np.float32), "TIFF"), "floating-point"),
    ]:
        with pytest.raises(images.PictureError, match=reason):
            prepare_picture(data, PLAIN)
        if "written" not in reason:
            with pytest.raises(images.PictureError, match=reason):
                images.reduced_rgb(data, PictureOptions(max_side=8))


def test_size_limit_is_the_header_s(gradient):
    data = encoded(gradient)
    megapixels = gradient.shape[0] * gradient.shape[1] / 1e6
    assert prepare_picture(data, PictureOptions(megapixels)).data == data
    with pytest.raises(images.PictureError, match="64x48"):
        prepare_picture(data, PictureOptions(megapixels * 0.99))


def test_picture_size_needs_a_jpeg_s_first_bytes_only(gradient):
    data = encoded(gradient)
    assert images.picture_size(data[:300]) == (64, 48) == images.picture_size(encoded(gradient, "PNG"))
    with pytest.raises(images.PictureError):
        images.picture_size(data[:30])


def test_options_are_refused_by_name():
    for values, name in [
        ({"max_megapixels": 0}, "--max-megapixels"),
        ({"max_megapixels": 179}, "--max-megapixels"),
        ({"max_side": 0}, "--max-side"),
        ({"short_side": 65501}, "--short-side"),
        ({"max_side": 9, "short_side": 9}, "--short-side"),
        ({"jpeg_quality": 0}, "--jpeg-quality"),
        ({"jpeg_quality": 101}, "--jpeg-quality"),
        ({"chroma": "4:1:1"}, "--chroma"),
    ]:
        with pytest.raises(ValueError, match=name):
            PictureOptions(**values)


def test_reduced_sizes_are_exact_and_never_nothing():
    assert PictureOptions().reduced_size(9000, 9000) is None
    for side in range(1, 300):
        assert PictureOptions(max_side=side).reduced_size(500, 375) == (side, max(1, int(side / 500 * 375)))
        assert PictureOptions(short_side=side).reduced_size(500, 375) == (int(side / 375 * 500), side)
        assert PictureOptions(max_side=side).reduced_size(side, side) is None
        assert PictureOptions(short_side=side).reduced_size(9000, side) is None
    assert PictureOptions(max_side=16).reduced_size(1, 10_000) == (1, 16)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (512, 384), (700, 30), (1, 10_000), (65_500, 2)])
def test_reduction_looks_like_an_area_filter(size):
    source = smooth(size[1], size[0])
    for data in (encoded(source, quality=95, subsampling=0), encoded(source, "PNG")):
        for options in (PictureOptions(max_side=256), PictureOptions(short_side=20, jpeg_quality=95, chroma="4:4:4")):
            wanted = options.reduced_size(*size)
            prepared = prepare_picture(data, options)
            if wanted is None:
                assert not prepared.resized
                continue
            exact = np.asarray(Image.fromarray(rgb(data)).resize(wanted, Image.Resampling.BOX)).astype(int)
            assert prepared.resized and prepared[1:3] == wanted == opened(prepared.data).size
            assert (prepared.reason is None) == (opened(data).format == "JPEG")
            assert np.abs(images.reduced_rgb(data, options) - exact).mean() < 1.5
            assert np.abs(rgb(prepared.data) - exact).mean() < 4


def test_quality_and_chroma_are_those_asked_for():
    data = encoded(smooth(96, 128))
    sizes = [len(prepare_picture(data, PictureOptions(max_side=64, jpeg_quality=q)).data) for q in (30, 90, 100)]
    assert sizes == sorted(set(sizes))
    for chroma, factors in (("4:2:0", (2, 2)), ("4:2:2", (2, 1)), ("4:4:4", (1, 1))):
        reduced = prepare_picture(data, PictureOptions(max_side=64, chroma=chroma)).data
        assert images.jpeg_header(reduced).components[0][1:3] == factors


def test_reduced_real_pictures_are_as_good_as_ffcv_s(imagenet_sample):
    import cv2

    options = PictureOptions(max_side=256)
    for path in sorted(imagenet_sample.rglob("*.JPEG"))[::10]:
        data = path.read_bytes()
        source = rgb(data)
        prepared = prepare_picture(data, options)
        wanted = options.reduced_size(source.shape[1], source.shape[0])
        if wanted is None:
            assert prepared.data == data or prepared.reason == "JPEG, mode L"
            continue
        exact = cv2.resize(source.astype(np.float32), wanted, interpolation=cv2.INTER_AREA)
        theirs = cv2.resize(source, wanted, interpolation=cv2.INTER_AREA)[..., ::-1]
        theirs = cv2.imencode(".jpg", theirs, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        noise = [np.square(rgb(jpeg) - exact).mean() for jpeg in (prepared.data, theirs)]
        assert noise[0] < noise[1] * 10**0.03  # 0.3 dB
