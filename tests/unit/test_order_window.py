"""A shuffle window of W shards: still each sample once, and no more than W shards at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import Layout, Order, permutation, training_micro_batches

PROPERTY = settings(max_examples=100, deadline=None)
SIZES = st.lists(st.integers(1, 9), min_size=2, max_size=12)


def windowed(sizes: list[int], window: int, seed: int = 3) -> Order:
    return Order(sum(sizes), seed, sizes, window)


@PROPERTY
@given(SIZES, st.integers(1, 14), st.integers(0, 5), st.data())
def test_each_sample_once_and_any_part_alone(sizes, window, epoch, data):
    """Whatever part of the positions is asked for, by whoever, in whatever order, it is the same."""
    n = sum(sizes)
    order = windowed(sizes, window)
    whole = order.ids(epoch, 0, n)
    assert whole.dtype == np.int64 and sorted(whole.tolist()) == list(range(n))
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    assert windowed(sizes, window).ids(epoch, start, stop).tolist() == whole[start:stop].tolist()
    order.ids(epoch + 1, 0, n)
    assert order.ids(epoch, start, stop).tolist() == whole[start:stop].tolist()


@PROPERTY
@given(SIZES, st.integers(1, 14), st.integers(0, 5))
def test_a_window_needs_its_own_shards_alone(sizes, window, epoch):
    """The samples from a position on come from the shards that are said to be needed there, the first W first."""
    order = windowed(sizes, window)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    ids = order.ids(epoch, 0, sum(sizes))
    at_once = min(window, len(sizes))
    for position in range(sum(sizes)):
        needed = order.shards(epoch, position).tolist()
        assert len(needed) == len(set(needed)) <= 2 * window or window >= len(sizes)
        assert shard_of[ids[position]] in needed[:at_once]
    # A shard's samples lie within one window of positions.
    for shard in range(len(sizes)):
        places = np.flatnonzero(shard_of[ids] == shard)
        assert places.max() - places.min() < sum(sorted(sizes)[-at_once:])


@PROPERTY
@given(SIZES, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 14), st.integers(0, 9))
def test_ranks_and_resumes_see_the_same(sizes, world, micro, accumulation, window, epoch):
    """More ranks than shards too: each step's samples do not depend on the layout, nor on where one began."""
    batch, n = world * micro * accumulation, sum(sizes)
    if n < batch:
        return
    steps = n // batch
    ranks = [
        list(training_micro_batches(windowed(sizes, window), epoch, Layout(r, world, micro, accumulation), 0))
        for r in range(world)
    ]
    assert {len(own) for own in ranks} == {steps * accumulation}
    seen = np.concatenate([b for s in range(steps) for own in ranks for b in own[s * accumulation :][:accumulation]])
    assert seen.tolist() == windowed(sizes, window).ids(epoch, 0, steps * batch).tolist()
    for start in (0, steps // 2, steps):
        tail = list(
            training_micro_batches(windowed(sizes, window), epoch, Layout(0, world, micro, accumulation), start)
        )
        assert [b.tolist() for b in tail] == [b.tolist() for b in ranks[0][start * accumulation :]]


def test_the_next_epoch_s_first_window_is_foreseen():
    sizes = [5] * 6
    order = windowed(sizes, 2)
    last = order.shards(0, 29)
    assert set(order.shards(1, 0)[:2].tolist()) <= set(last.tolist())
    assert order.shards(0, 30).tolist() == order.shards(1, 0)[:4].tolist()  # the end is the next one's beginning


def test_a_window_of_all_shards_is_the_whole_permutation():
    """And without one every shard is needed all the time."""
    for window in (0, 4, 9):
        order = windowed([5] * 4, window)
        assert order.ids(2, 0, 20).tolist() == permutation(20, 3, 2).tolist()
        assert order.shards(2, 7).tolist() == [0, 1, 2, 3]


# A resumed run must find its order again. Never edit these: the order changed.
GOLDEN = (
    [0, 2, 8, 1, 7, 5, 4, 13, 9, 10, 11, 6, 3, 12],
    [7, 3, 8, 5, 6, 4, 1, 13, 2, 0, 9, 11, 12, 10],
)


def test_golden_values():
    assert windowed([3, 4, 2, 5], 2, seed=0).ids(0, 0, 14).tolist() == GOLDEN[0]
    assert windowed([3, 4, 2, 5], 2, seed=1).ids(3, 0, 14).tolist() == GOLDEN[1]


def test_epochs_and_windows_are_shuffled_apart():
    order = windowed([50] * 8, 2)
    parts = [order.ids(epoch, start, start + 100) % 50 for epoch in (0, 1) for start in (0, 100, 200)]
    assert len({part.tobytes() for part in parts}) == len(parts)


def test_a_window_without_shards_is_refused():
    """A .beton alone, whose shards are gone."""
    with pytest.raises(ValueError, match=r"data\.window 2 needs shards, and they hold 0 of 10"):
        Order(10, 0, (), 2)
