"""Decoding: what is no picture, too large or cut off is one ValueError that names the sample."""

import warnings

import numpy as np
import pytest
from small_shards import SIDE, jpeg

from pipeline.data.decode import MAX_PIXELS, decode_rgb


def forged(width: int, height: int) -> bytes:
    """A small JPEG whose header declares another size."""
    data = bytearray(jpeg(1))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize(("width", "height"), [(8000, 6251), (10_000, 9_500), (65_000, 65_000)])
def test_pictures_over_the_limit_are_refused_by_their_header(width, height):
    assert width * height > MAX_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        with pytest.raises(ValueError, match="sample 3 of it"):
            decode_rgb(forged(width, height), "sample 3 of it")


def test_what_is_no_picture_is_refused():
    for data in (b"", b"text", bytes(500), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(ValueError, match=r"sample 3.*data_prep verify"):
            decode_rgb(data, "sample 3")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_damaged_pictures_give_a_picture_or_a_valueerror_and_nothing_else(form):
    data = jpeg(1, format=form)
    assert decode_rgb(data, "it").size == (SIDE, SIDE)
    rng = np.random.RandomState(0)
    refused = 0
    for trial in range(300):
        changed = bytearray(data[: rng.randint(1, len(data))] if trial % 3 == 0 else data)
        for _ in range(1 + trial % 4):
            changed[rng.randint(min(len(changed), 300 if trial % 2 else len(changed)))] ^= 1 << rng.randint(8)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                decode_rgb(bytes(changed), "sample 3")
        except ValueError as error:
            assert "sample 3" in str(error)
            refused += 1
    assert refused > 50
