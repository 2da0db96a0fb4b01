"""The native engine makes of every picture what Pillow makes of it, bit for bit, or leaves it to Pillow."""

import io
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import native
from pipeline.data.augment import AugmentConfig, apply_training, evaluation_transform, training_crops
from pipeline.data.decode import MAX_PIXELS

PROPERTY = settings(max_examples=150, deadline=None)
needs_library = pytest.mark.skipif(native.library() is None, reason="no native loader was built")
pytestmark = needs_library


def pixels(width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3): smooth parts, edges and noise."""
    draw = np.random.RandomState(seed)
    coarse = draw.randint(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8)
    smooth = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    smooth[height // 3 : height // 2] = draw.randint(0, 256, smooth[height // 3 : height // 2].shape)
    return smooth


def jpeg(width: int, height: int, seed: int = 0, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(width, height, seed)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def view_of(config: AugmentConfig, size: int, epoch: int | None, seed: int = 5) -> native.View:
    c = config
    return native.View(size, seed, epoch, c.scale, c.ratio, c.flip, c.interpolation, c.eval_crop, c.eval_crop_share)


def by_pillow(image: Image.Image, config: AugmentConfig, size: int, epoch: int | None, sample_id: int) -> np.ndarray:
    if epoch is None:
        return np.asarray(evaluation_transform(config, size)(image)).transpose(1, 2, 0)
    (crop,) = training_crops([image.size], np.array([sample_id]), 5, epoch, config)
    return np.asarray(apply_training(image, crop, size, config))


def check_same(data: bytes, config: AugmentConfig, size: int, epoch: int | None, sample_id: int = 0) -> None:
    status, out, _ = native.make_picture(data, view_of(config, size, epoch), sample_id)
    assert status == native.OK
    expected = by_pillow(Image.open(io.BytesIO(data)).convert("RGB"), config, size, epoch, sample_id)
    assert np.array_equal(out, expected), f"{(out != expected).sum()} values differ"


# The box


@PROPERTY
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 9000)) | st.tuples(st.integers(1, 9000), st.integers(1, 700))
    ),
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
    st.floats(0.05, 20),
    st.floats(1, 20),
    st.floats(0, 1),
    st.integers(0, 2**62),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**31),
)
@example([(100, 1), (1, 100), (1, 1)], (0.08, 1.0), 0.05, 2.0, 0.5, 0, 0, 0)
def test_boxes_and_flips_are_augments(sizes, scale, low_ratio, spread, flip, first_id, seed, epoch):
    config = AugmentConfig(scale=(min(scale), max(scale)), ratio=(low_ratio, low_ratio * spread), flip=flip)
    ids = first_id + np.arange(len(sizes))
    expected = training_crops(sizes, ids, seed, epoch, config) if sizes else []
    found = native.training_crops(np.array(sizes).reshape(-1, 2), ids, view_of(config, 8, epoch, seed))
    assert [tuple(crop) for crop in found.tolist()] == [tuple(map(int, crop)) for crop in expected]


def test_a_hundred_thousand_boxes_of_a_usual_picture():
    config, ids = AugmentConfig(), np.arange(100_000)
    found = native.training_crops(np.tile([500, 375], (len(ids), 1)), ids, view_of(config, 224, 3))
    assert np.array_equal(found, np.array(training_crops([(500, 375)] * len(ids), ids, 5, 3, config)))


# The resize


@PROPERTY
@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.integers(1, 70) | st.sampled_from([160, 224]),
    st.sampled_from(["bilinear", "bicubic"]),
    st.sampled_from(["center", "squash"]),
    st.floats(0.3, 1),
    st.one_of(st.none(), st.integers(0, 9)),
)
@example(333, 500, 224, "bicubic", "center", 0.9, None)  # Pillow resizes the height first
@example(500, 333, 224, "bilinear", "center", 0.9, None)  # the width first
@example(64, 64, 64, "bicubic", "squash", 1.0, None)  # nothing to resize
@example(1, 700, 3, "bicubic", "center", 0.5, 1)
@example(700, 1, 3, "bilinear", "center", 0.5, 1)
def test_raw_pixels_become_pillows(width, height, size, interpolation, eval_crop, share, epoch):
    config = AugmentConfig(interpolation=interpolation, eval_crop=eval_crop, eval_crop_share=share)
    picture = np.random.RandomState(width).randint(0, 256, (height, width, 3), dtype=np.uint8)
    if height > 2:
        picture[: height // 2] = 255 * (picture[: height // 2] > 127)  # bicubic overshoots here
    status, out, _ = native.make_picture(picture.tobytes(), view_of(config, size, epoch), 3, (width, height))
    assert status == native.OK
    assert np.array_equal(out, by_pillow(Image.fromarray(picture), config, size, epoch, 3))


def test_a_large_reduction_is_pillows():
    """More taps than any fast path takes at once."""
    picture = np.random.RandomState(0).randint(0, 256, (1500, 2100, 3), dtype=np.uint8)
    for interpolation in ("bilinear", "bicubic"):
        config = AugmentConfig(interpolation=interpolation, eval_crop="squash")
        status, out, _ = native.make_picture(picture.tobytes(), view_of(config, 7, None), 0, (2100, 1500))
        assert status == native.OK
        assert np.array_equal(out, by_pillow(Image.fromarray(picture), config, 7, None, 0))


# The decoder

KINDS = {
    "4:2:0": {},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4", "quality": 97},
    "grey": {"mode": "L"},
    "progressive": {"progressive": True},
    "grey progressive": {"mode": "L", "progressive": True},
    "RGB": {"keep_rgb": True},
    "optimised": {"optimize": True, "comment": b"hello", "icc_profile": b"p" * 300},
    "coarse": {"quality": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_window_of_every_kind(kind):
    draw = random.Random(kind)
    for _ in range(25):
        width, height = draw.randint(1, 140), draw.randint(1, 140)
        data = jpeg(width, height, draw.randrange(99), **KINDS[kind])
        whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        for _ in range(8):
            left, top = draw.randrange(width), draw.randrange(height)
            w, h = draw.randint(1, width - left), draw.randint(1, height - top)
            status, part, spliced = native.decode_window(data, (left, top, w, h))
            assert (status, spliced) == (native.OK, False)
            assert np.array_equal(part, whole[top : top + h, left : left + w]), (kind, width, height, left, top, w, h)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_of_every_kind(kind):
    for number, (width, height) in enumerate([(150, 100), (90, 131), (40, 300), (16, 8)]):
        data = jpeg(width, height, number, **KINDS[kind])
        config = AugmentConfig(interpolation="bilinear" if number % 2 else "bicubic")
        for epoch in (None, 0, 1, 2):
            check_same(data, config, 48, epoch, number)


def test_exif_rotation_is_not_applied():
    tags = Image.Exif()
    tags[0x0112] = 6
    check_same(jpeg(60, 40, exif=tags.tobytes()), AugmentConfig(), 32, None)


def other_formats() -> dict[str, bytes]:
    found = {"CMYK": jpeg(40, 30, mode="CMYK"), "nothing": b"", "text": b"no picture at all" * 9}
    for name in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(pixels(40, 30)).save(buffer, name)
        found[name] = buffer.getvalue()
    whole = jpeg(40, 30)
    found["no end"] = whole[:-2]
    found["cut off"] = whole[: len(whole) * 2 // 3]
    found["header only"] = whole[: whole.index(b"\xff\xda")]
    found["without tables"] = whole[: whole.index(b"\xff\xdb")] + whole[whole.index(b"\xff\xc0") :]
    return found


@pytest.mark.parametrize("name", other_formats())
def test_what_the_engine_does_not_do_is_left_to_pillow(name):
    view = view_of(AugmentConfig(), 16, 0)
    native.make_picture(jpeg(40, 30), view)  # whose tables must not serve the next
    status, out, _ = native.make_picture(other_formats()[name], view)
    assert status == native.ASK_REFERENCE and not out.any()


def with_size(data: bytes, width: int, height: int) -> bytes:
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[frame + 9 :]


def test_a_header_over_the_limit_is_refused_before_anything_is_decoded():
    view = view_of(AugmentConfig(), 16, 0)
    side = int(MAX_PIXELS**0.5)
    assert native.make_picture(with_size(jpeg(40, 30), side + 1, side + 1), view)[0] == native.TOO_LARGE
    assert native.make_picture(with_size(jpeg(40, 30), side, side), view)[0] != native.TOO_LARGE
    assert native.make_picture(b"", view, raw_size=(60_000, 60_000))[0] == native.TOO_LARGE
    assert native.make_picture(b"123", view, raw_size=(2, 1))[0] == native.ASK_REFERENCE


def test_damaged_jpegs_are_pillows_or_left_to_it():
    """Flipped bits whose checksum was taken afterwards, so that the decoder sees them: never other pixels, no crash."""
    draw, counts = random.Random(0), {native.OK: 0, native.ASK_REFERENCE: 0, native.TOO_LARGE: 0}
    config = AugmentConfig(interpolation="bilinear")
    sources = [jpeg(90, 70, 1, **options) for options in KINDS.values()]
    sources += [jpeg(90, 70, 2, restart_marker_blocks=2), jpeg(90, 70, 3, restart_marker_rows=1)]
    for number in range(1500):
        data = bytearray(draw.choice(sources))
        headers = data.index(b"\xff\xda") + 14
        for _ in range(draw.randint(1, 3)):
            end = len(data) if draw.random() < 0.5 else headers
            data[draw.randrange(end)] ^= 1 << draw.randrange(8)
        status, out, _ = native.make_picture(bytes(data), view_of(config, 24, 0), number)
        counts[status] += 1
        if status == native.OK:
            image = Image.open(io.BytesIO(bytes(data))).convert("RGB")
            assert np.array_equal(out, by_pillow(image, config, 24, 0, number)), f"damage {number}"
    assert min(counts[native.OK], counts[native.ASK_REFERENCE]) > 200


def test_real_pictures(imagenet_sample):
    """Of each, a training crop and the evaluation's, at the sizes that runs have."""
    paths = sorted(imagenet_sample.glob("*/*.JPEG"))
    assert len(paths) == 250
    for number, path in enumerate(paths):
        config = AugmentConfig(
            interpolation="bicubic" if number % 2 else "bilinear", eval_crop="squash" if number % 3 == 0 else "center"
        )
        for epoch in (None, number % 7):
            check_same(path.read_bytes(), config, 224 if number % 5 else 160, epoch, number)
