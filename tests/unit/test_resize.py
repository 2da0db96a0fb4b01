"""Reduction by area: the C and its specification give the same bytes, and both the mean of what is covered."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import resize
from data_prep.native import library
from data_prep.resize import area_weights, reduce_by_area


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plainly(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = area_weights(pixels.shape[0], size[1]), area_weights(pixels.shape[1], size[0])
    return resize._reduce_plainly(pixels, rows, columns)


@st.composite
def reductions(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int]]:
    height, width = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    return picture(height, width, draw(st.integers(0, 99))), (draw(st.integers(1, width)), draw(st.integers(1, height)))


@given(reductions())
@settings(max_examples=300, deadline=None)
def test_c_and_specification_give_the_same_bytes(reduction):
    pixels, size = reduction
    assert library() is not None, "`make setup` has built no C"
    assert np.array_equal(reduce_by_area(pixels, size), plainly(pixels, size))


@pytest.mark.parametrize(("old", "new"), [(1, 1), (7, 7), (500, 256), (375, 192), (4000, 3), (65500, 256), (300, 299)])
def test_weights_cover_every_old_pixel_by_its_share(old, new):
    first, weights = area_weights(old, new)
    assert (weights.sum(1, dtype=np.int64) == 1 << 14).all() and (weights >= 0).all()
    assert weights.shape[1] % 2 == 0
    share = np.zeros(old + weights.shape[1])
    np.add.at(share, first[:, None] + np.arange(weights.shape[1]), weights)
    assert not share[old:].any()
    # Each counts for new/old of a pixel; where two new ones share it, each of their parts is rounded.
    assert np.abs(share[:old] - (1 << 14) * new / old).max() <= 2


# Half a level of rounding, and what 14 and 7 bits lose: with 375 taps each weight's rounding adds to that.
@pytest.mark.parametrize(
    ("size", "bound"), [((256, 192), 0.52), ((250, 187), 0.52), ((499, 374), 0.52), ((500, 1), 0.75)]
)
def test_it_is_the_mean_of_what_is_covered(size, bound):
    cv2 = pytest.importorskip("cv2")
    pixels = picture(375, 500)
    exact = cv2.resize(pixels.astype(np.float64), size, interpolation=cv2.INTER_AREA)
    assert np.abs(reduce_by_area(pixels, size) - exact).max() < bound


def test_flat_pictures_stay_flat_and_the_same_size_the_same_bytes():
    for level in (0, 1, 128, 255):
        assert (reduce_by_area(np.full((97, 61, 3), level, np.uint8), (17, 40)) == level).all()
    pixels = picture(33, 47)
    assert np.array_equal(reduce_by_area(pixels, (47, 33)), pixels)


def test_a_view_with_gaps_is_taken_as_it_looks():
    pixels = picture(60, 80)[::2, 5:65, ::-1]
    assert np.array_equal(reduce_by_area(pixels, (20, 13)), plainly(pixels, (20, 13)))
