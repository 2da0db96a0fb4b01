"""The engine's own entropy decoder: all that a sequential JPEG may hold, with restart markers anywhere and without."""

import io
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import native
from tests.unit.test_loader_native_pixels import jpeg, needs_library
from tests.unit.test_loader_restart_decode import check, decoded, markers, window

pytestmark = needs_library
ROOT = Path(native.__file__).parents[2]

# How many blocks of the first component an MCU has, across and down: as Pillow writes it, and as it is then read.
# An MCU of 2 x 1 blocks holds what one of 1 x 2 does; the picture becomes another one, and stays a right JPEG.
RELABELLED = {
    "4:4:0": ("4:2:2", (2, 1), (1, 2)),
    "4:1:1": ("4:2:0", (2, 2), (4, 1)),
    "four rows": ("4:2:0", (2, 2), (1, 4)),
}


def relabelled(kind: str, columns: int, rows: int, **options) -> bytes:
    """A JPEG of so many MCUs."""
    written, before, after = RELABELLED[kind]
    data = bytearray(jpeg(8 * before[0] * columns, 8 * before[1] * rows, subsampling=written, **options))
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11] == before[0] << 4 | before[1]
    # One pixel less than the last MCU has.
    data[frame + 5 : frame + 9] = (8 * after[1] * rows - 1).to_bytes(2, "big") + (8 * after[0] * columns - 1).to_bytes(
        2
    )
    data[frame + 11] = after[0] << 4 | after[1]
    return bytes(data)


def noise(width: int, height: int, seed: int, **options) -> bytes:
    """Of every length of code and value that there is, with quality=100."""
    buffer = io.BytesIO()
    picture = np.random.RandomState(seed).choice([0, 255], (height, width, 3)).astype(np.uint8)
    picture[: height // 2, :, 1] = np.random.RandomState(seed).randint(0, 256, (height // 2, width))
    Image.fromarray(picture).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_libjpegs_entropy_decoder_is_replaced():
    """Where it is not, all of this file passes without a look at what it is about."""
    assert native.library().nn_loader_entropy_decoder().decode() in ("BMI2", "any")


@pytest.mark.parametrize("interval", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 18, 27, 31])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_every_interval(subsampling, interval):
    draw = random.Random(interval)
    for size in ((131, 90), (144, 67)):  # 9 MCUs in a row, or 17 or 18
        data = jpeg(*size, interval, subsampling=subsampling, restart_marker_blocks=interval, quality=85)
        whole = decoded(data)
        for _ in range(12):
            check(data, whole, window(draw, *size))


@pytest.mark.parametrize("interval", [0, 1, 3, 5, 13])
@pytest.mark.parametrize("kind", RELABELLED)
def test_other_samplings(kind, interval):
    draw = random.Random(interval)
    data = relabelled(kind, 5, 6, restart_marker_blocks=interval)
    image = Image.open(io.BytesIO(data))
    whole = decoded(data)
    for _ in range(30):
        check(data, whole, window(draw, *image.size))


@pytest.mark.parametrize("quality", [1, 30, 75, 92, 98, 100])
@pytest.mark.parametrize("optimize", [False, True])
def test_codes_and_values_of_every_length(quality, optimize):
    draw = random.Random(quality)
    for interval in (0, 2, 40):
        options = {"quality": quality, "optimize": optimize, "restart_marker_blocks": interval}
        data = noise(150, 110, quality, subsampling="4:4:4", **options)
        whole = decoded(data)
        for _ in range(10):
            check(data, whole, window(draw, 150, 110))


def test_pictures_of_one_pixel_and_of_one_row():
    for width, height in ((1, 1), (1, 200), (200, 1), (2, 2), (3, 17), (4, 33), (17, 4)):
        for interval in (0, 1, 2):
            data = jpeg(width, height, 1, restart_marker_blocks=interval)
            whole, draw = decoded(data), random.Random(width)
            for _ in range(8):
                check(data, whole, window(draw, width, height))


@pytest.mark.parametrize("interval", [0, 1, 4, 10])
def test_damage_between_the_codes(interval):
    """Flipped bits in the codes alone: the pixels are Pillow's, or are left to it. Markers spare most of it."""
    draw, counts = random.Random(interval), {native.OK: 0, native.ASK_REFERENCE: 0}
    whole = jpeg(160, 130, 3, restart_marker_blocks=interval, quality=90)
    begin = whole.index(b"\xff\xda") + 14
    for _ in range(500):
        data = bytearray(whole)
        data[draw.randrange(begin, len(data) - 2)] ^= 1 << draw.randrange(8)
        left, top, width, height = window(draw, 160, 130)
        status, part, _ = native.decode_window(bytes(data), (left, top, width, height))
        counts[status] += 1
        if status == native.OK:
            try:
                expected = decoded(bytes(data))
            except OSError:  # a marker in the middle, below the window
                continue
            assert np.array_equal(part, expected[top : top + height, left : left + width])
    assert counts[native.ASK_REFERENCE] > 20
    assert counts[native.OK] > (250 if interval in (1, 4) else 50)


def test_a_segment_that_does_not_end_at_its_marker_is_left_to_pillow():
    data = jpeg(160, 130, restart_marker_blocks=2)
    for number in (3, 20):
        at = markers(data)[number]
        for bad in (data[:at] + b"\x55" + data[at:], data[: at - 1] + data[at:], data[: at - 9] + data[at:]):
            assert native.decode_window(bad, (0, 0, 160, 130))[0] == native.ASK_REFERENCE


def test_a_scan_that_ends_too_soon_is_left_to_pillow():
    data = jpeg(160, 130)
    cut = data[: len(data) * 2 // 3] + b"\xff\xd9"
    assert native.decode_window(cut, (0, 0, 160, 130))[0] == native.ASK_REFERENCE
    assert native.decode_window(cut, (0, 0, 90, 30))[0] == native.OK  # its codes are there


_HASH = """
import hashlib, sys
from pipeline.data import native
digest = hashlib.sha256()
for path in sys.argv[1:]:
    data = open(path, "rb").read()
    for box in ((0, 0, 150, 110), (37, 0, 60, 110), (0, 51, 33, 20), (100, 80, 50, 30)):
        status, part, _ = native.decode_window(data, box)
        assert status == native.OK
        digest.update(part.tobytes())
print(native.library().nn_loader_entropy_decoder().decode(), digest.hexdigest())
"""


def hashed(paths: list[Path], lanes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _HASH, *map(str, paths)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "NOISYNN_LANES": lanes},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_instruction_set_reads_the_same(tmp_path):
    paths, found = [], {}
    for number, interval in enumerate((0, 1, 2, 3, 5, 10, 20)):
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(noise(150, 110, number, quality=80 + number, restart_marker_blocks=interval))
    sets = ("AVX2", "one lane")
    with ThreadPoolExecutor() as pool:  # each takes seconds to start
        results = dict(zip(sets, pool.map(lambda lanes: hashed(paths, lanes), sets), strict=True))
    for lanes, done in results.items():
        if "NOISYNN_LANES is" in done.stderr:
            continue  # this processor has it not
        name, found[lanes] = done.stdout.split()
        assert name == ("any" if lanes == "one lane" else "BMI2"), done.stderr
    assert "one lane" in found and len(set(found.values())) == 1
