"""Any ranks, workers, batches, windows, and any chain of kills and resumes: each sample once, in one order."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_reader import Numbers, same, stream
from small_shards import beton, tars

from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import EvaluationLoader, TrainLoader
from pipeline.data.order import Layout, Order

GLOBAL_BATCH = 12
LAYOUTS = [(w, m, GLOBAL_BATCH // w // m) for w in (1, 2, 3, 4, 6, 12) for m in (1, 2, 3, 12) if 12 % (w * m) == 0]


def ranks_of(world: int, micro: int, accumulation: int, reader, seed: int, window: int, workers: int = 0):
    return [TrainLoader(reader, Layout(r, world, micro, accumulation), seed, workers, window) for r in range(world)]


def steps_of(loaders: list[TrainLoader], count: int) -> list[list[int]]:
    """The next `count` steps of all ranks together, each in the global order."""
    accumulation = loaders[0].layout.accumulation
    streams = [stream(loader) for loader in loaders]
    steps = []
    for _ in range(count):
        micro = [[next(own).sample_ids.tolist() for _ in range(accumulation)] for own in streams]
        steps.append([i for own in micro for batch in own for i in batch])
    for own in streams:
        own.close()
    return steps


def expected_steps(sizes: list[int], seed: int, window: int, count: int) -> list[list[int]]:
    n = sum(sizes)
    order = Order(n, seed, sizes, window)
    per_epoch = n // GLOBAL_BATCH
    found = []
    for step in range(count):
        epoch, within = divmod(step, per_epoch)
        found.append(order.ids(epoch, within * GLOBAL_BATCH, (within + 1) * GLOBAL_BATCH).tolist())
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 15), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) >= GLOBAL_BATCH),
    st.integers(0, 99),
    st.integers(0, 4),
    st.lists(st.tuples(st.sampled_from(LAYOUTS), st.integers(0, 4), st.booleans()), min_size=1, max_size=5),
)
def test_any_chain_of_runs_gives_the_one_order(sizes, seed, window, runs):
    """Each run takes over the last one's state, in another layout, and is stopped after some steps, or none.

    Fewer shards than ranks, states that are saved twice, before the first batch and at an epoch's edge are among them.
    """
    state, seen = None, []
    for layout, steps, twice in runs:
        loaders = ranks_of(*layout, Numbers(sum(sizes), tuple(sizes)), seed, window)
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(state)
                if twice:
                    loader.load_state_dict(loader.state_dict())
        seen += steps_of(loaders, steps)
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states), "the ranks are at different places"
        state = states[0]
        assert (state["epoch"], state["position"]) == (
            len(seen) // (sum(sizes) // GLOBAL_BATCH),
            len(seen) % (sum(sizes) // GLOBAL_BATCH) * GLOBAL_BATCH,
        )
    assert seen == expected_steps(sizes, seed, window, len(seen))
    per_epoch = sum(sizes) // GLOBAL_BATCH
    for start in range(0, len(seen) - per_epoch + 1, per_epoch):
        ids = [i for step in seen[start : start + per_epoch] for i in step]
        assert len(set(ids)) == len(ids) == per_epoch * GLOBAL_BATCH


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(1, 7))
def test_evaluation_counts_each_once(n, batch, group, world):
    """Ranks that get nothing end at once."""
    loaders = [EvaluationLoader(Numbers(n), np.arange(n), batch, group, rank, world, 0) for rank in range(world)]
    assert [i for loader in loaders for b in loader for i in b.sample_ids.tolist()] == list(range(n))


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("read", [tars, beton], ids=["tars", "beton"])
def test_pictures_are_the_same_in_any_layout_and_from_any_container(jpg_split, read, window):
    """Crops and flips too, by native threads and by worker processes; over an epoch's edge."""
    augment = AugmentConfig(scale=(0.2, 0.9))
    plain = TrainLoader(tars(jpg_split, augment), Layout(0, 1, GLOBAL_BATCH, 1), 5, 2, window)
    expected = list(itertools.islice(stream(plain), 3))
    for layout, workers, threaded in [((2, 6, 1), 2, True), ((3, 2, 2), 1, True), ((2, 3, 2), 2, False)]:
        reader = read(jpg_split, augment)
        reader.threaded = threaded and reader.threaded
        loaders = ranks_of(*layout, reader, 5, window, workers)
        found = [list(itertools.islice(stream(loader), 3 * layout[2])) for loader in loaders]
        for step, whole in enumerate(expected):
            micro = [b for own in found for b in own[step * layout[2] : (step + 1) * layout[2]]]
            for batch, first in zip(micro, range(0, GLOBAL_BATCH, layout[1]), strict=True):
                part = type(whole)(*(tensor[first : first + layout[1]] for tensor in whole[:3]))
                assert same(batch, part), (layout, step, first)
        for loader in loaders:
            loader.close()
