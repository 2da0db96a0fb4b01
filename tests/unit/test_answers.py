"""What is counted of answers, against counts written out; and what two models' answers say of each other."""

import dataclasses
import json
import weakref

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from pipeline.accuracy import Accuracy, accuracy_of, compare
from pipeline.answers import ROUNDING, Answers, answers_of, joined

N, CLASSES = 400, 12


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits, labels, ids): a label's logit is raised, so that neither all nor none are right."""
    rng = np.random.RandomState(0)
    labels = rng.randint(0, CLASSES, N)
    logits = rng.standard_normal((N, CLASSES)).astype(np.float32) * 2
    logits[np.arange(N), labels] += 2
    return logits, labels, rng.permutation(5000)[:N]


def answers(logits: np.ndarray, labels: np.ndarray, ids: np.ndarray) -> Answers:
    return answers_of(torch.from_numpy(logits), torch.from_numpy(labels), torch.from_numpy(ids))


def test_each_column_is_what_it_is_called(drawn):
    logits, labels, ids = drawn
    found = answers(*drawn)
    in_order = np.sort(logits, axis=1)
    shares = log_softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_array_equal(found.sample_ids, ids)
    np.testing.assert_array_equal(found.predicted, logits.argmax(1))
    np.testing.assert_array_equal(found.label_rank, (logits > logits[np.arange(N), labels][:, None]).sum(1))
    np.testing.assert_allclose(found.loss, -shares[np.arange(N), labels], rtol=1e-12)
    np.testing.assert_allclose(found.confidence, np.exp(shares.max(1)), rtol=1e-12)
    np.testing.assert_allclose(found.margin, in_order[:, -1].astype(np.float64) - in_order[:, -2], rtol=1e-12)
    np.testing.assert_array_equal(found.largest, np.abs(logits).max(1))


def test_counts_are_those_of_timm_and_of_the_written_out_sums(drawn):
    from timm.utils import accuracy

    logits, labels, _ = drawn
    found = answers(*drawn)
    theirs = accuracy(torch.from_numpy(logits), torch.from_numpy(labels), topk=(1, 5))
    assert (100 * found.top1 / N, 100 * found.top5 / N) == pytest.approx([t.item() for t in theirs], rel=1e-6)
    assert N / 4 < found.top1 < found.top5 < N
    right, seen = found.per_class(CLASSES)
    for label in range(CLASSES):
        mine = labels == label
        assert (right[label], seen[label]) == ((logits[mine].argmax(1) == label).sum(), mine.sum())
    assert right.sum() == found.top1 and seen.sum() == N


def test_the_calibration_error_is_the_written_out_one(drawn):
    logits, labels, _ = drawn
    confidence = np.exp(log_softmax(logits.astype(np.float64), axis=1)).max(1)
    right = logits.argmax(1) == labels
    expected = 0.0
    for i in range(15):
        inside = (confidence >= i / 15) & ((confidence < (i + 1) / 15) | (i == 14))
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert answers(*drawn).calibration_error() == pytest.approx(expected, rel=1e-9)
    sure = answers(np.array([[90.0, 0.0]] * 4), np.array([0, 0, 0, 1]), np.arange(4))
    assert sure.calibration_error() == pytest.approx(0.25)


def test_the_order_changes_no_figure_to_the_bit(drawn):
    whole = answers(*drawn)
    shuffled = np.random.RandomState(1).permutation(N)
    logits, labels, ids = (part[shuffled] for part in drawn)
    parts = [answers(logits[a:b], labels[a:b], ids[a:b]) for a, b in ((0, 7), (7, 7), (7, 250), (250, N))]
    again = joined(iter(parts), N)
    assert accuracy_of(again, "x", where=str) == accuracy_of(whole, "x", where=str)
    for one, other in zip(again.by_id().columns(), whole.by_id().columns(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_part_may_go_once_it_is_copied(drawn):
    """Kept until the end of a pass, its small arrays would break up the heap."""
    parts: list[weakref.ref] = []

    def one_by_one():
        for start in range(0, N, 50):
            assert not [part for part in parts[:-1] if part() is not None]  # the one before is still in hand
            part = answers(*(column[start : start + 50] for column in drawn))
            parts.append(weakref.ref(part))
            yield part
            del part

    assert len(joined(one_by_one(), N)) == N and len(parts) == -(-N // 50)


def test_of_equal_logits_the_first_class_is_answered_and_only_its_label_is_right():
    logits = np.array([[1.0, 3.0, 3.0, 0.0]] * 4)
    found = answers(logits, np.arange(4), np.arange(4))
    assert found.predicted.tolist() == [1] * 4
    assert found.label_rank.tolist() == [2, 0, 1, 3]
    assert found.top1 == 1 and found.near_ties.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("largest", [3.0, -300.0])
def test_near_ties_are_relative_to_the_largest_logit(largest):
    """Which may be a negative one."""
    bound = ROUNDING * abs(largest)
    top = 2.0
    logits = np.array([[largest, top, top - factor * bound] for factor in (0.99, 1.01, -0.5)])
    if largest > 0:
        logits[:, 1] = largest - np.array([0.99, 1.01, 0.0]) * bound
        logits[:, 2] = 0
    found = answers(logits, np.zeros(3, np.int64), np.array([30, 10, 20]))
    assert found.near_ties.tolist() == [20, 30]


def test_one_class_alone_is_no_tie():
    found = answers(np.zeros((2, 1)), np.zeros(2, np.int64), np.arange(2))
    assert found.top1 == 2 and not len(found.near_ties) and found.mean_loss == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_is_refused_by_sample(drawn, value):
    logits, labels, ids = drawn
    bad = logits.copy()
    bad[37, 3] = value
    with pytest.raises(ValueError, match=f"not finite at sample {ids[37]}: "):
        answers(bad, labels, ids)


def test_an_accuracy_comes_back_from_json(drawn):
    tied = answers(np.zeros((2, 3)), np.array([0, 1]), np.array([8, 4]))
    for found in (accuracy_of(tied, "x", where="picture {}".format), accuracy_of(answers(*drawn), "x")):
        body = json.loads(json.dumps(found.to_json()))
        assert body["top1"] == found.correct_top1 / found.num_images
        assert body["top1_interval"] == list(found.top1_interval)
        assert Accuracy.from_json(body, "x.json") == found
    assert accuracy_of(answers(*drawn), "x").near_ties is None
    ties = accuracy_of(tied, "x", where="picture {}".format).near_ties
    assert [(tie.sample_id, tie.name) for tie in ties] == [(4, "picture 4"), (8, "picture 8")]


@pytest.mark.parametrize("wrong", [{"correct_top1": 401}, {"correct_top1": -1}, {"correct_top5": 3}, {"num_images": 0}])
def test_counts_that_cannot_be_are_refused(drawn, wrong):
    body = accuracy_of(answers(*drawn), "x").to_json() | wrong
    with pytest.raises(ValueError, match=r"x\.json is damaged \(its counts"):
        Accuracy.from_json(body, "x.json")


def test_two_models_are_compared_picture_by_picture(drawn):
    logits, labels, ids = drawn
    other = logits + np.random.RandomState(2).standard_normal(logits.shape).astype(np.float32)
    shuffled = np.random.RandomState(3).permutation(N)
    found = compare(answers(*drawn), answers(other[shuffled], labels[shuffled], ids[shuffled]))
    one, two = logits.argmax(1) == labels, other.argmax(1) == labels
    assert (found.only_one, found.only_other) == ((one & ~two).sum(), (two & ~one).sum())
    assert found.only_one > found.only_other > 0 and found.num_images == N
    assert found.to_json()["p_value"] == found.p_value < 0.5


def test_answers_to_other_pictures_or_labels_are_not_compared(drawn):
    own = answers(*drawn)
    with pytest.raises(ValueError, match="400 and 399 answers are not to the same pictures"):
        compare(own, answers(*(part[1:] for part in drawn)))
    labels = own.labels.copy()
    labels[:2] = (labels[:2] + 1) % CLASSES
    with pytest.raises(ValueError, match=r"2 of 400 pictures are labelled otherwise"):
        compare(own, dataclasses.replace(own, labels=labels))
