"""JPEGs rewritten with restart markers: the same pixels from any decoder, all segments kept, nothing guessed at."""

import functools
import io
import random
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep import restart_markers
from data_prep.images import PictureOptions, prepare_picture
from data_prep.jpeg import DRI, SEQUENTIAL_FRAMES, grey_to_rgb, well_formed
from data_prep.restart_markers import (
    IN_DOUBT,
    LONGER,
    MAX_INTERVAL,
    ODD,
    PROGRESSIVE,
    REFUSED,
    REWRITTEN,
    mcus_in_row,
    restart_interval,
    with_restart_markers,
)

SOURCE = Path(restart_markers.__file__).parent / "csrc" / "jpeg_restart.c"
SAMPLINGS = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "4:1:1": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
}
# (height, width): smaller than a block, with partial MCUs, one row, one column, primes, a multiple of 5 MCUs.
SIZES = ((1, 1), (17, 33), (1, 1000), (1000, 1), (31, 376), (64, 320), (75, 240))


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3), smooth with some noise."""
    draw = np.random.RandomState(seed)
    coarse = draw.randint(0, 256, (5, 6, 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (smooth.reshape(height, width, 3) + draw.randint(-9, 10, (height, width, 3))).clip(0, 255).astype(np.uint8)


def by_opencv(sampling: str, height: int, width: int, quality: int = 88) -> bytes:
    settings = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling], cv2.IMWRITE_JPEG_QUALITY, quality]
    written, encoded = cv2.imencode(".jpg", pixels(height, width), settings)
    assert written
    return encoded.tobytes()


def by_pillow(height: int = 50, width: int = 90, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(height, width)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def decoded(data: bytes) -> tuple[np.ndarray, ...]:
    """As Pillow sees it; as OpenCV does, turned by EXIF and not; and at a quarter of the size, by other code."""
    values = np.frombuffer(data, np.uint8)
    quarter = Image.open(io.BytesIO(data))
    quarter.draft("RGB", (max(1, quarter.width // 4), max(1, quarter.height // 4)))
    return (
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        cv2.imdecode(values, cv2.IMREAD_COLOR),
        cv2.imdecode(values, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION),
        np.asarray(quarter.convert("RGB")),
    )


def segments(data: bytes) -> list[bytes]:
    """Up to the first scan's header; behind it, as the last one, all the rest."""
    found, at = [], 2
    while not found or found[-1][1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found.append(data[at:end])
        at = end
    return [*found, data[at:]]


def assert_rewritten(data: bytes) -> bytes:
    """The rewritten JPEG, once it was found to be what the loader relies on, and the same picture."""
    result = with_restart_markers(data)
    assert result.outcome == REWRITTEN
    before, after = well_formed(data), well_formed(result.data)
    assert before is not None and after is not None
    assert after.components == before.components and after.frame in SEQUENTIAL_FRAMES
    for old, new in zip(decoded(data), decoded(result.data), strict=True):
        np.testing.assert_array_equal(old, new)
    # One scan, an interval that divides a row, and each marker in its place.
    *head, scan = segments(result.data)
    assert head[-1][4] == 3 and b"\xff\xda" not in scan
    (interval,) = (int.from_bytes(part[4:], "big") for part in head if part[1] == DRI)
    row = mcus_in_row(before)
    assert interval == restart_interval(row) and row % interval == 0
    rows = -(-before.height // (8 * max(c.vertical for c in before.components)))
    markers = [match[0][1] - 0xD0 for match in re.finditer(rb"\xff[\xd0-\xd7]", scan)]
    assert markers == [number % 8 for number in range(rows * row // interval - 1)]
    assert with_restart_markers(result.data) == (result.data, REWRITTEN)
    return result.data


@given(st.integers(1, 8188))
def test_the_interval_divides_a_row_and_none_larger_does(row):
    interval = restart_interval(row)
    assert 1 <= interval <= MAX_INTERVAL and row % interval == 0
    assert all(row % larger for larger in range(interval + 1, MAX_INTERVAL + 1))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("size", SIZES)
def test_same_pixels_from_any_decoder(sampling, size):
    assert_rewritten(by_opencv(sampling, *size))


@pytest.mark.parametrize("size", SIZES)
def test_grey_turned_colour_becomes_one_scan(size):
    colour = grey_to_rgb(by_pillow(*size, mode="L"))
    assert colour is not None and colour.count(b"\xff\xda") == 2
    assert_rewritten(colour)


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 100},
        {"quality": 1},
        {"optimize": True},
        {"restart_marker_blocks": 3},
        {"restart_marker_rows": 1},
        {"keep_rgb": True},
        {"qtables": [[300] * 64, [400] * 64]},
    ],
)
def test_whatever_it_was_encoded_with(options):
    assert_rewritten(by_pillow(120, 200, **options))


def test_exif_profile_and_comment_stay_in_their_order():
    thumbnail = by_pillow(16, 16)
    data = by_pillow(exif=exif(6) + thumbnail, icc_profile=bytes(range(256)) * 400, comment=b"hello")
    data = data[:2] + b"\xff\xfe\x00\x07first" + data[2:]
    rewritten = assert_rewritten(data)
    assert cv2.imdecode(np.frombuffer(rewritten, np.uint8), cv2.IMREAD_COLOR).shape == (90, 50, 3)  # turned
    kept = [[part for part in segments(jpeg) if part[1] >= 0xE0] for jpeg in (data, rewritten)]
    assert kept[0] == kept[1] and len(kept[0]) == 6  # JFIF, EXIF, two of the profile, two comments


def test_no_segment_that_was_not_there_is_added():
    data = by_pillow()
    assert data[2:4] == b"\xff\xe0"
    bare = data[:2] + data[4 + int.from_bytes(data[4:6], "big") :]
    assert b"JFIF" not in assert_rewritten(bare) and b"Adobe" not in assert_rewritten(by_pillow(keep_rgb=True))[2:4]


def test_bytes_behind_the_end_are_dropped():
    data = by_pillow()
    assert assert_rewritten(data + b"\xff\xd8 a trailer") == assert_rewritten(data)


def odd_sampling() -> bytes:
    """2x1, 1x1, 1x1 said to be 4x1, 2x1, 1x1: chroma has neither all samples nor the fewest."""
    data = by_opencv("4:1:1", 16, 64)
    at = data.index(b"\xff\xc0") + 11
    assert data[at] == 0x41
    return data[: at + 3] + b"\x21" + data[at + 4 :]


def broken_off() -> bytes:
    data = by_pillow(100, 100)
    return data[: len(data) // 2] + b"\xff\xd9"


@pytest.mark.parametrize(
    ("make", "outcome"),
    [
        (functools.partial(by_pillow, progressive=True), PROGRESSIVE),
        (functools.partial(by_pillow, mode="CMYK"), IN_DOUBT),
        (functools.partial(by_pillow, mode="L"), ODD),
        (odd_sampling, ODD),
        (broken_off, REFUSED),
        (lambda: by_pillow(100, 100)[:-300], IN_DOUBT),
        (lambda: cv2.imencode(".png", pixels(9, 9))[1].tobytes(), IN_DOUBT),
        (lambda: b"", IN_DOUBT),
        (lambda: prepare_picture(one_colour(), PictureOptions()).data, LONGER),
    ],
    ids=["progressive", "CMYK", "grey", "sampling", "broken off", "no end", "PNG", "empty", "one colour"],
)
def test_kept_byte_for_byte(make, outcome):
    data = make()
    assert with_restart_markers(data) == (data, outcome)


def one_colour() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1264, 1264), "red").save(buffer, "JPEG", subsampling="4:2:0")  # 79 MCUs in a row, a prime
    return buffer.getvalue()


def damaged(draw: random.Random, data: bytes) -> bytes:
    bad = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        at, kind = draw.randrange(len(bad)), draw.randrange(4)
        if kind == 0:
            bad[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            bad[at : at + 2] = draw.randrange(1 << 16).to_bytes(2, "big")
        elif kind == 2:
            del bad[at : at + draw.randrange(1, 40)]
        else:
            bad[at:at] = bytes([0xFF, draw.randrange(256)])
    return bytes(bad)


KINDS = (
    by_pillow(40, 56),
    by_pillow(40, 56, subsampling="4:4:4", restart_marker_blocks=2, exif=exif(3)),
    by_opencv("4:4:0", 33, 40),
    by_opencv("4:1:1", 20, 70),
    grey_to_rgb(by_pillow(40, 56, mode="L")) or b"",
)


def test_damaged_ones_are_kept_or_give_the_same_pixels():
    draw, outcomes = random.Random(0), {REWRITTEN: 0, IN_DOUBT: 0, REFUSED: 0}
    for _ in range(3000):
        data = damaged(draw, draw.choice(KINDS))
        result = with_restart_markers(data)
        outcomes[result.outcome] = outcomes.get(result.outcome, 0) + 1
        if result.outcome != REWRITTEN:
            assert result.data == data
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for old, new in zip(decoded(data), decoded(result.data), strict=True):
                np.testing.assert_array_equal(old, new, data.hex())
    assert min(outcomes[name] for name in (REWRITTEN, IN_DOUBT, REFUSED)) > 100, outcomes


def test_it_compiles_without_a_warning_and_stays_in_bounds(tmp_path):
    """Under the sanitizers, on damaged files and with too little room: a byte too far or a leak ends the program."""
    program = tmp_path / "rewrite.c"
    program.write_text(f'''
#include "{SOURCE}"
#include <stdlib.h>
int main(int count, char **paths) {{
    for (int i = 1; i < count; i++) {{
        FILE *file = fopen(paths[i], "rb");
        fseek(file, 0, SEEK_END);
        size_t size = ftell(file), room = size * (i % 3) / 2;
        rewind(file);
        uint8_t *data = malloc(size), *out = malloc(room);
        if (fread(data, 1, size, file) != size) return 2;
        fclose(file);
        printf("%ld\\n", (long)nn_restart_rewrite(data, size, i % 4, out, room));
        free(data);
        free(out);
    }}
}}
''')
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "setup.sh builds with a C compiler: install one"
    flags = ["-O1", "-g", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    program_built = tmp_path / "rewrite"
    command = [compiler, *flags, "-fno-sanitize-recover", "-o", program_built, program, "-ljpeg"]
    subprocess.run(command, check=True)
    draw, paths = random.Random(1), []
    for number in range(600):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(damaged(draw, KINDS[number % len(KINDS)]) if number % 5 else KINDS[number // 5 % 5])
    done = subprocess.run([program_built, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = [int(line) for line in done.stdout.split()]
    assert len(results) == 600 and {-1, 0} < set(results) and max(results) > 500


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_real_pictures(imagenet_sample, every):
    before = after = 0
    for path in sorted(imagenet_sample.glob("*/*.JPEG"))[::every]:
        data = prepare_picture(path.read_bytes(), PictureOptions()).data
        before, after = before + len(data), after + len(assert_rewritten(data))
    assert before < after < 1.04 * before


def test_a_library_that_is_missing_or_old_is_refused_with_the_mend(tmp_path, monkeypatch):
    try:
        for content in (None, b"no library"):
            path = tmp_path / "libdata_prep_jpeg.so"
            if content is not None:
                path.write_bytes(content)
            restart_markers.rewriter.cache_clear()
            with monkeypatch.context() as patched:
                patched.setattr(restart_markers, "LIBRARY", path)
                with pytest.raises(ValueError, match=r"--restart-markers.*libjpeg-dev.*make setup"):
                    with_restart_markers(KINDS[0])
        with monkeypatch.context() as patched:
            patched.setattr(restart_markers, "ABI", 99)
            with pytest.raises(ValueError, match="another version of its source"):
                restart_markers.rewriter()
    finally:
        restart_markers.rewriter.cache_clear()
