"""The order: each sample exactly once, the same global batches for any number of ranks, resumable at any step."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.order import (
    Layout,
    Order,
    class_mate_share,
    class_order,
    evaluation_batches,
    layout_of,
    permutation,
    shuffled_order,
    steps_per_epoch,
    training_micro_batches,
)

# The time of one example says nothing about the property.
PROPERTY = settings(max_examples=100, deadline=None)


@st.composite
def spreads(draw):
    """(num_samples, world_size, micro_batch, accumulation, seed, epoch) with at least one step."""
    world, micro, accumulation = (draw(st.integers(1, high)) for high in (6, 5, 3))
    num_samples = draw(st.integers(world * micro * accumulation, 200))
    return num_samples, world, micro, accumulation, draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 1000))


def epoch_of(n: int, layout: Layout, seed: int, epoch: int, start: int = 0) -> list[np.ndarray]:
    return list(training_micro_batches(Order(n, seed), epoch, layout, start))


def global_steps(n: int, world: int, micro: int, accumulation: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Each step's samples in the global order: rank after rank, micro-batch after micro-batch."""
    ranks = [epoch_of(n, Layout(rank, world, micro, accumulation), seed, epoch) for rank in range(world)]
    steps = len(ranks[0]) // accumulation
    assert all(len(own) == steps * accumulation for own in ranks), "ranks take another number of steps"
    return [np.concatenate([b for own in ranks for b in own[s * accumulation :][:accumulation]]) for s in range(steps)]


# Golden values: a resumed run must find its order again, whatever the versions. Never edit these: the order changed.
@pytest.mark.parametrize(
    ("seed", "epoch", "expected"),
    [
        (0, 0, [3, 7, 6, 4, 1, 0, 2, 8, 5, 9]),
        (0, 1, [9, 4, 0, 8, 1, 5, 3, 2, 6, 7]),
        (1, 0, [2, 9, 8, 3, 6, 7, 1, 4, 0, 5]),
    ],
)
def test_permutation_golden_values(seed, epoch, expected):
    order = permutation(10, seed, epoch)
    assert order.tolist() == expected
    ids = Order(10, seed).ids(epoch, 2, 9)
    assert ids.tolist() == expected[2:9] and ids.dtype == np.int64


def test_permutations_differ_by_seed_and_epoch():
    orders = {permutation(50, seed, epoch).tobytes() for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert np.array_equal(shuffled_order(50, 3), permutation(50, 3, 0))


def test_permutation_does_not_touch_the_global_generator():
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    permutation(100, 0, 0)
    assert np.random.rand() == expected


@PROPERTY
@given(spreads())
@example((7, 2, 3, 1, 0, 0))
@example((200, 1, 1, 1, 0, 0))
def test_each_sample_of_an_epoch_exactly_once_but_the_dropped_tail(spread):
    n, world, micro, accumulation, seed, epoch = spread
    seen = np.concatenate(global_steps(*spread))
    batch = world * micro * accumulation
    assert len(seen) == n - n % batch
    assert len(np.unique(seen)) == len(seen)
    assert seen.min() >= 0 and seen.max() < n
    assert np.array_equal(seen, permutation(n, seed, epoch)[: len(seen)])
    for rank in range(world):
        assert all(len(b) == micro for b in epoch_of(n, Layout(rank, world, micro, accumulation), seed, epoch))


@PROPERTY
@given(st.integers(24, 150), st.integers(0, 99), st.integers(0, 9))
def test_a_step_is_the_same_for_any_layout(n, seed, epoch):
    """All ways to make a global batch of 24 take the same samples in the same order at each step."""
    layouts = [(w, m, 24 // w // m) for w in (1, 2, 3, 4, 8, 24) for m in (1, 2, 4, 24) if 24 % (w * m) == 0]
    expected = global_steps(n, 1, 24, 1, seed, epoch)
    for layout in layouts:
        for mine, other in zip(global_steps(n, *layout, seed, epoch), expected, strict=True):
            assert np.array_equal(mine, other), layout


@PROPERTY
@given(spreads(), st.data())
def test_resuming_at_any_step_gives_the_tail(spread, data):
    n, world, micro, accumulation, seed, epoch = spread
    layout = Layout(data.draw(st.integers(0, world - 1)), world, micro, accumulation)
    whole = epoch_of(n, layout, seed, epoch)
    start = data.draw(st.integers(0, len(whole) // accumulation))
    tail = epoch_of(n, layout, seed, epoch, start)
    assert len(tail) == len(whole) - start * accumulation
    assert all(np.array_equal(a, b) for a, b in zip(tail, whole[start * accumulation :], strict=True))


@PROPERTY
@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8), st.integers(1, 4))
def test_layout_of_takes_the_largest_micro_batch_or_names_what_would_do(global_batch, most, world, multiple):
    fitting = [micro for micro in range(1, most + 1) if global_batch % (micro * world) == 0 and micro % multiple == 0]
    try:
        layout = layout_of(global_batch, most, 0, world, multiple)
    except ValueError as error:
        assert not fitting
        assert f"{world} ranks" in str(error) if global_batch % world else f"multiple of {multiple}" in str(error)
    else:
        assert layout.micro_batch == max(fitting)
        assert layout.global_batch == global_batch


@PROPERTY
@given(st.integers(1, 64), st.integers(1, 16), st.integers(2, 8))
def test_the_sizes_that_a_refusal_names_are_taken(global_batch, most, multiple):
    try:
        layout_of(global_batch, most, 0, 1, multiple)
    except ValueError as error:
        named, _, larger = (
            str(error).partition("sizes that do divide one: ")[2].partition("; or take a micro_batch of ")
        )
        for size in named.split(", "):
            layout_of(global_batch, most, 0, 1, int(size))
        if larger:
            assert layout_of(global_batch, int(larger), 0, 1, multiple).micro_batch == int(larger)


def test_the_recipe_of_1024_fits_four_nodes_of_eight():
    layout = layout_of(1024, 128, 31, 32, multiple_of=8)
    assert (layout.micro_batch, layout.accumulation) == (32, 1)


@pytest.mark.parametrize(("global_batch", "micro"), [(0, 1), (8, 0), (-8, 2), (8, -1)])
def test_batches_below_1_are_refused(global_batch, micro):
    with pytest.raises(ValueError, match="at least 1"):
        layout_of(global_batch, micro, 0, 1)


def test_a_global_batch_over_the_epoch_is_refused():
    assert steps_per_epoch(10, 10) == 1
    assert steps_per_epoch(19, 10) == 1
    with pytest.raises(ValueError, match=r"global_batch 11 is larger than the epoch of 10"):
        steps_per_epoch(10, 11)


# Evaluation


@PROPERTY
@given(st.integers(0, 120), st.integers(1, 30), st.integers(1, 12), st.integers(1, 9))
@example(3, 8, 4, 5)  # fewer groups than ranks
@example(10, 1, 4, 2)  # a group larger than the batch
def test_evaluation_covers_each_once_and_never_splits_a_group(n, batch, group, world):
    order = np.random.RandomState(n).permutation(n)
    per_rank = [list(evaluation_batches(order, batch, group, rank, world)) for rank in range(world)]
    batches = list(itertools.chain.from_iterable(per_rank))
    assert np.array_equal(np.concatenate([*batches, np.empty(0, np.int64)]), order)  # once each, in the order
    groups_alone = [order[start : start + group].tolist() for start in range(0, n, group)]
    # The noise splits a batch into groups from its start: these must be the groups of the whole order.
    seen = [b[start : start + group].tolist() for b in batches for start in range(0, len(b), group)]
    assert seen == groups_alone
    assert all(0 < len(b) <= max(batch, group) for b in batches)
    assert all(len(b) % group == 0 for b in batches[:-1])


@PROPERTY
@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 7))
def test_evaluation_shares_are_even(n, group, world):
    sizes = [sum(map(len, evaluation_batches(np.arange(n), 16, group, r, world))) for r in range(world)]
    assert max(sizes) - min(sizes) <= 2 * group  # one group more, and the last may be short


@PROPERTY
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_class_order_is_imagefolder_s(labels):
    ids = class_order(np.array(labels))
    expected = [i for label in range(5) for i, own in enumerate(labels) if own == label]
    assert ids.tolist() == expected


@PROPERTY
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 12))
def test_class_mate_share_by_counting(labels, group):
    shares = []
    for i, label in enumerate(labels):
        first = i // group * group
        mates = [j for j in range(first, min(first + group, len(labels))) if j != i]
        if mates:
            shares.append(sum(labels[j] == label for j in mates) / len(mates))
    found = class_mate_share(np.array(labels), group)
    if shares:
        assert found == pytest.approx(np.mean(shares), abs=1e-12)
    else:
        assert np.isnan(found)


@pytest.mark.parametrize(
    ("k", "percent"),
    [(2, 100.0), (5, 100.0), (10, 100.0), (25, 100.0), (50, 100.0), (16, 88.8), (64, 57.2), (512, 9.3)],
)
def test_class_mate_share_of_imagenet_s_validation_set(k, percent):
    """The table of PAPER.md section 5: 50,000 pictures, 50 a class, in class order; stated to one decimal."""
    share = class_mate_share(np.repeat(np.arange(1000), 50), k)
    assert round(100 * share, 1) == percent


def test_class_mate_share_of_a_random_order_is_small():
    labels = np.repeat(np.arange(1000), 50)[shuffled_order(50_000, 0)]
    # Expected 49 / 49,999; 450,000 pairs of mates, so a standard error of about 0.00007 (each pair counts twice).
    assert class_mate_share(labels, 10) == pytest.approx(49 / 49_999, abs=5 * 0.00007)


def test_class_mate_share_is_not_defined_without_mates():
    assert np.isnan(class_mate_share(np.array([1, 1, 1]), 1))
    assert class_mate_share(np.array([1, 1, 2]), 2) == 1.0  # the last is alone and does not count
