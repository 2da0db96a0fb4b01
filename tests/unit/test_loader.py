"""The training loader's batches and state, and evaluation's shares: the same for any workers, ranks and restarts."""

import itertools

import numpy as np
import pytest
import torch
from numbers_reader import Numbers, ids_of, same, stream
from small_shards import EXACT, beton, tars

from pipeline.data.augment import AugmentConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import EvaluationLoader, TrainLoader
from pipeline.data.order import Layout, permutation

ONE_RANK = Layout(0, 1, 4, 2)  # 24 samples: 3 steps of 8 an epoch, each of two micro-batches


class Faulty(Numbers):
    """Fails at sample 13."""

    def batch(self, sample_ids: np.ndarray, epoch: int | None, in_hand=None) -> Batch:
        if 13 in sample_ids:
            raise ValueError("sample 13 is damaged")
        return super().batch(sample_ids, epoch)


@pytest.mark.parametrize(
    "augment",
    [AugmentConfig(randaugment="rand-m9-mstd0.5-inc1"), AugmentConfig(three_augment=True, color_jitter=0.3)],
    ids=["randaugment", "3-augment"],
)
def test_worker_processes_give_the_same_batches(jpg_split, augment):
    """Over two epochs, with crops, flips and colours; the workers stay from epoch to epoch."""
    found = []
    for workers in (0, 2):
        loader = TrainLoader(tars(jpg_split, augment), ONE_RANK, seed=5, workers=workers)
        found.append([batch for _ in range(2) for batch in loader])
    plain = next(iter(TrainLoader(tars(jpg_split, AugmentConfig()), ONE_RANK, seed=5, workers=0)))
    assert not plain.images.equal(found[0][0].images)
    assert len(found[0]) == len(found[1]) == 12
    assert all(itertools.starmap(same, zip(*found, strict=True)))
    assert not found[0][0].images.equal(found[0][6].images)  # the epochs differ


def test_a_beton_gives_the_samples_that_tars_give(raw_split):
    loaders = [TrainLoader(read(raw_split, EXACT), ONE_RANK, seed=5, workers=2) for read in (tars, beton)]
    for one, other in zip(*(list(loader) for loader in loaders), strict=True):
        assert same(one, other)


def test_batches_are_the_order_s_and_carry_the_epoch():
    loader = TrainLoader(Numbers(26), ONE_RANK, seed=5, workers=0)
    for epoch in range(3):
        batches = list(loader)
        assert np.concatenate(ids_of(batches)).tolist() == permutation(26, 5, epoch)[:24].tolist()
        assert all(b.images[0, 0, 0, 0] == (b.sample_ids[0] + 100 * epoch) % 256 for b in batches)
        assert all(b.labels.equal(b.sample_ids % 2) for b in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_at_every_step_gives_the_rest(workers):
    """State taken after each micro-batch of two epochs; within a step it is the step's beginning."""
    whole = list(itertools.islice(stream(TrainLoader(Numbers(26), ONE_RANK, 5, 0)), 12))
    loader = TrainLoader(Numbers(26), ONE_RANK, 5, 0)
    states = [loader.state_dict()]
    for _ in itertools.islice(stream(loader), 12):
        states.append(loader.state_dict())
        assert loader.state_dict() == states[-1]  # asking does not move it
    for done, state in enumerate(states):
        # With worker processes each start takes 0.1 s: the epoch's edges and one place within.
        if workers and done not in (0, 3, 6, 7):
            continue
        resumed = TrainLoader(Numbers(26), ONE_RANK, 5, workers)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state  # saved again before a batch is read
        first = done - done % 2
        rest = list(itertools.islice(stream(resumed), 12 - first))
        assert ids_of(rest) == ids_of(whole[first:]), done
        assert all(itertools.starmap(same, zip(rest, whole[first:], strict=True)))


def test_the_end_of_an_epoch_is_the_start_of_the_next():
    loader = TrainLoader(Numbers(24), ONE_RANK, 5, 0)
    batches = iter(loader)
    for _ in range(6):
        next(batches)
    at_the_last_batch = loader.state_dict()
    assert list(batches) == []
    assert loader.state_dict() == at_the_last_batch
    assert (at_the_last_batch["epoch"], at_the_last_batch["position"]) == (1, 0)
    assert loader.epoch == 1


def test_a_state_goes_on_at_another_layout():
    """Saved by one rank with accumulation, resumed by two ranks with smaller micro-batches: the same steps."""
    loader = TrainLoader(Numbers(26), ONE_RANK, 5, 0)
    batches = ids_of(list(itertools.islice(iter(loader), 2)))
    state = loader.state_dict()
    assert state["position"] == 8
    expected = [a + b for a, b in itertools.pairwise(ids_of(list(loader)))][::2]
    ranks = []
    for rank in range(2):
        resumed = TrainLoader(Numbers(26), Layout(rank, 2, 2, 2), 5, 0)
        resumed.load_state_dict(state)
        ranks.append(ids_of(list(resumed)))
    steps = [[i for own in ranks for micro in own[2 * s : 2 * s + 2] for i in micro] for s in range(len(ranks[0]) // 2)]
    assert steps == expected
    assert not {i for step in steps for i in step} & {i for batch in batches for i in batch}


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: TrainLoader(Numbers(26), ONE_RANK, 6, 0), r"seed was 5, is 6"),
        (lambda: TrainLoader(Numbers(27), ONE_RANK, 5, 0), r"num_samples was 26, is 27"),
        (lambda: TrainLoader(Numbers(26), Layout(0, 1, 5, 1), 5, 0), r"position 8 with global_batch 5"),
    ],
)
def test_a_state_of_another_order_is_refused(loader, message):
    first = TrainLoader(Numbers(26), ONE_RANK, 5, 0)
    list(itertools.islice(iter(first), 2))
    other = loader()
    before = other.state_dict()
    with pytest.raises(ValueError, match=f"cannot resume.*{message}"):
        other.load_state_dict(first.state_dict())
    assert other.state_dict() == before


def test_a_global_batch_over_the_split_is_refused():
    with pytest.raises(ValueError, match="global_batch 8 is larger"):
        TrainLoader(Numbers(7), ONE_RANK, 5, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_reading_reaches_the_loop(workers):
    loader = TrainLoader(Faulty(24), ONE_RANK, 5, workers)
    with pytest.raises(ValueError, match=r"^sample 13 is damaged$"):
        list(loader)
    assert loader.state_dict()["epoch"] == 0


def test_training_leaves_the_workers_generators_out():
    """Batches do not depend on torch's or numpy's global state."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        found.append(ids_of(list(TrainLoader(Numbers(24), ONE_RANK, 5, 0))))
    assert found[0] == found[1]


def test_randaugment_leaves_the_caller_s_generators_alone(jpg_split):
    """Without worker processes too: it is done between the caller's own steps, not beside them."""
    augment = AugmentConfig(randaugment="rand-m9-mstd0.5-inc1")
    expected = list(TrainLoader(tars(jpg_split, augment), ONE_RANK, 5, 0))
    np.random.seed(3)
    drawn = [np.random.rand(50).tolist() for _ in expected]
    np.random.seed(3)
    for batch, whole, mine in zip(TrainLoader(tars(jpg_split, augment), ONE_RANK, 5, 0), expected, drawn, strict=True):
        assert [np.random.rand() for _ in range(50)] == mine
        assert same(batch, whole)


@pytest.mark.parametrize("threaded", [True, False])
def test_only_the_newest_iteration_goes_on(threaded):
    """Two would move one place in the epoch: the older is told."""
    numbers = Numbers(26)
    numbers.threaded = threaded
    loader = TrainLoader(numbers, ONE_RANK, 5, 0)
    older, newer = iter(loader), iter(loader)
    first = next(older)
    assert next(newer).sample_ids.equal(first.sample_ids)
    with pytest.raises(RuntimeError, match="another iteration of this loader has begun"):
        next(older)
    assert len(list(newer)) == 5


@pytest.mark.parametrize(("epoch", "position"), [(0, 24), (0, -8), (-1, 0)])
def test_a_damaged_state_is_refused(epoch, position):
    loader = TrainLoader(Numbers(26), ONE_RANK, 5, 0)
    with pytest.raises(ValueError, match=rf"cannot resume at position {position} of epoch {epoch}: it is damaged"):
        loader.load_state_dict(loader.state_dict() | {"epoch": epoch, "position": position})


# Evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_sees_each_once_over_the_ranks(world_size, workers):
    order = np.random.RandomState(0).permutation(23)
    ranks = range(world_size if workers == 0 else 1)  # processes for one rank: each start takes 0.1 s
    seen = [ids_of(list(EvaluationLoader(Numbers(23), order, 6, 4, r, world_size, workers))) for r in ranks]
    found = [i for own in seen for batch in own for i in batch]
    assert found == order.tolist()[: len(found)]
    assert len(found) == (23 if workers == 0 or world_size == 1 else 6 // world_size * 4)
    groups = [batch[i : i + 4] for own in seen for batch in own for i in range(0, len(batch), 4)]
    assert groups == [order[i : i + 4].tolist() for i in range(0, len(found), 4)]


def test_evaluation_can_be_read_twice_and_takes_no_augmentation(jpg_split):
    loader = EvaluationLoader(tars(jpg_split), np.arange(24), 10, 1, 0, 1, workers=0)
    one, other = list(loader), list(loader)
    assert len(one) == 3 and all(itertools.starmap(same, zip(one, other, strict=True)))
    assert same(one[0], tars(jpg_split).batch(np.arange(10), epoch=None))
