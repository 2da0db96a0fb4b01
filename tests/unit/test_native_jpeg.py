"""The JPEG check in C says of every input what the reference in Python says."""

import io
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import jpeg, native

SOURCE = Path(native.__file__).parent / "csrc" / "jpeg_check.c"


def encoded(side: int = 40, mode: str = "RGB", **options) -> bytes:
    pixels = np.random.RandomState(side).randint(0, 256, (side // 8 + 1, side // 8 + 2, 3), np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels).resize((side + 3, side), Image.Resampling.BICUBIC).convert(mode)
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def exif() -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags.tobytes()


KINDS = [
    encoded(),
    encoded(quality=95, subsampling="4:4:4", optimize=True),
    encoded(mode="L"),
    encoded(mode="CMYK"),
    encoded(progressive=True),
    encoded(mode="L", progressive=True),
    encoded(exif=exif(), icc_profile=b"p" * 200, comment=b"hello"),
    encoded(restart_marker_blocks=2),
    encoded(side=8) + b"trailing",
]


def same(data: bytes) -> bool:
    verdict, _ = native.jpeg_check(data)
    expected = jpeg.well_formed_reference(data)
    return jpeg.well_formed(data) == expected and (verdict != native.WELL_FORMED) <= (
        expected is None or verdict == native.ASK_REFERENCE
    )


def damaged(draw: random.Random) -> bytes:
    """A JPEG of some kind with one to three damages, most of them in its headers."""
    data = bytearray(draw.choice(KINDS))
    for _ in range(draw.randrange(1, 4)):
        end = len(data) if draw.random() < 0.3 else max(1, min(len(data), data.find(b"\xff\xda") + 20))
        at, other = draw.randrange(end), draw.randrange(end)
        kind = draw.randrange(8)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.choice([0, 1, 2, 3, 4, 0xC0, 0xC2, 0xC4, 0xD9, 0xDA, 0xDB, 0xE1, 0xFE, 0xFF])
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + draw.randrange(1, 80)]
        elif kind == 4:
            data[at:at] = data[other : other + draw.randrange(1, 200)]
        elif kind == 5:
            data[at:at] = bytes([0xFF, draw.randrange(256)])
        elif kind == 6:
            data[at : at + 2] = draw.randrange(1 << 16).to_bytes(2, "big")
        else:
            starts = [i for i in range(len(data) - 1) if data[i] == 0xFF and data[i + 1] >= 0xC0][:12]
            one, two = draw.choice(starts or [0]), draw.choice(starts or [0])
            length = 2 + int.from_bytes(data[two + 2 : two + 4], "big")
            data[one:one] = data[two : two + length]
        if not data:
            break
    return bytes(data)


def test_the_library_was_built():
    """By `make setup`; without it all else here would compare the reference with itself."""
    assert native.library() is not None


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_every_kind_and_every_cut(number):
    data = KINDS[number]
    assert (jpeg.well_formed(data) is None) == (number == 3)  # CMYK is in doubt
    assert same(data)
    assert all(same(data[:length]) for length in range(len(data)))
    for place in range(min(len(data), 700)):
        for bit in (0, 3, 7):
            bad = bytearray(data)
            bad[place] ^= 1 << bit
            assert same(bytes(bad)), (place, bit)


def test_twenty_thousand_damaged_ones():
    draw = random.Random(0)
    verdicts = {native.IN_DOUBT: 0, native.WELL_FORMED: 0}
    for number in range(20_000):
        data = damaged(draw)
        assert same(data), f"damage {number}: {data.hex()}"
        verdicts[native.jpeg_check(data)[0]] += 1
    assert min(verdicts.values()) > 1000


def test_more_exif_segments_than_there_is_room_for():
    data = KINDS[6]
    (span,) = jpeg.well_formed_reference(data).exif
    segment = data[slice(*span)]
    for count in (8, 9, 30):
        many = data[:2] + segment * count + data[2:]
        assert same(many)
        assert native.jpeg_check(many)[0] == (native.ASK_REFERENCE if count + 1 > native.MAX_SPANS else 1)


def test_real_pictures(imagenet_sample):
    for path in sorted(imagenet_sample.glob("*/*.JPEG")):
        data = path.read_bytes()
        assert same(data) and jpeg.well_formed(data) is not None


def test_a_library_that_is_missing_or_old_is_said_once_and_the_reference_used(tmp_path, monkeypatch, capsys):
    for content in (None, b"no library"):
        path = tmp_path / "libdata_prep.so"
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setattr(native, "LIBRARY", path)
        native.library.cache_clear()
        assert [jpeg.well_formed(data) is None for data in KINDS].count(True) == 1
        assert capsys.readouterr().err.count("make setup") == 1
    native.library.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(native, "ABI", 99)
    assert jpeg.well_formed(KINDS[0]) == jpeg.well_formed_reference(KINDS[0])
    assert "another version of its source" in capsys.readouterr().err
    native.library.cache_clear()


def test_it_compiles_without_a_warning_and_stays_in_bounds(tmp_path):
    """Under the sanitizers, on damaged files of exact size: a byte read too far ends the program."""
    program = tmp_path / "check.c"
    program.write_text(f'''
#include "{SOURCE}"
#include <stdio.h>
#include <stdlib.h>
int main(int count, char **paths) {{
    struct nn_jpeg found;
    for (int i = 1; i < count; i++) {{
        FILE *file = fopen(paths[i], "rb");
        fseek(file, 0, SEEK_END);
        size_t size = ftell(file);
        rewind(file);
        uint8_t *data = malloc(size ? size : 1);
        if (fread(data, 1, size, file) != size) return 2;
        fclose(file);
        printf("%d\\n", nn_jpeg_check(data, size, &found));
        free(data);
    }}
}}
''')
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "setup.sh builds with a C compiler: install one"
    flags = ["-O1", "-g", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    subprocess.run([compiler, *flags, "-fno-sanitize-recover", "-o", tmp_path / "check", program], check=True)
    draw, paths = random.Random(1), []
    for number in range(1500):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(damaged(draw))
    done = subprocess.run([tmp_path / "check", *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [str(native.jpeg_check(path.read_bytes())[0]) for path in paths]
    assert done.stdout.split() == expected
