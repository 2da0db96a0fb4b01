"""Intervals and tests of significance, against scipy's."""

import numpy as np
import pytest
from scipy import stats
from sign_flips import p_of

from pipeline.intervals import holm, mcnemar, mean_interval, sign_flip, wilson


@pytest.mark.parametrize(
    ("correct", "of"),
    [(0, 1), (1, 1), (0, 10), (10, 10), (1, 3), (5943, 10_000), (0, 50_000), (42_265, 50_000), (50_000, 50_000)],
)
def test_wilson_is_scipy_s(correct, of):
    expected = stats.binomtest(correct, of).proportion_ci(0.95, method="wilson")
    assert wilson(correct, of) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("correct", "of"), [(0, 0), (-1, 5), (6, 5)])
def test_counts_that_cannot_be_have_no_interval(correct, of):
    with pytest.raises(ValueError, match=f"{correct} of {of}"):
        wilson(correct, of)


def test_wilson_holds_the_truth_as_often_as_it_says():
    """Of 4,000 draws of 50 with a share of 0.8 the interval holds 0.8 in about 95 %."""
    counts = np.random.RandomState(0).binomial(50, 0.8, 4000)
    held = [low <= 0.8 <= high for low, high in (wilson(int(count), 50) for count in counts)]
    assert 0.93 < np.mean(held) < 0.97


@pytest.mark.parametrize(
    ("only_one", "only_other"),
    [(0, 0), (1, 0), (3, 3), (0, 12), (7, 19), (310, 402), (1, 5000), (24_700, 25_300), (25_000, 25_000), (0, 50_000)],
)
def test_mcnemar_is_the_exact_binomial_test(only_one, only_other):
    n = only_one + only_other
    expected = stats.binomtest(only_one, n).pvalue if n else 1.0
    assert mcnemar(only_one, only_other) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert mcnemar(only_other, only_one) == mcnemar(only_one, only_other)


@pytest.mark.parametrize("differences", [[], [0, 0], [3], [2, 2, -1], [5, -3, 4, 0, 1, 1, -2, 7], [-4] * 9, [1, -1]])
def test_flips_of_whole_groups_are_those_written_out(differences):
    expected = p_of(differences)
    assert sign_flip(np.array(differences, np.int64)) == pytest.approx(expected, rel=1e-12)
    assert sign_flip(-np.array(differences, np.int64)) == pytest.approx(expected, rel=1e-12)


def test_flips_of_groups_of_one_are_mcnemars():
    for one, other in ((3, 3), (0, 12), (310, 402), (4_900, 5_300)):
        assert sign_flip(np.array([1] * one + [-1] * other + [0] * 9)) == pytest.approx(mcnemar(one, other), rel=1e-9)


@pytest.mark.parametrize("k", [2, 10, 50])
def test_flips_of_groups_reject_an_equal_model_as_seldom_as_they_say(k):
    """Whole groups answered alike, by two equally good models: McNemar's test finds up to 83 % of them to differ."""
    rng = np.random.RandomState(k)
    found, independent = [], []
    for _ in range(400):
        one, other = rng.rand(2, 1000 // k) < 0.7
        found.append(sign_flip(k * (one.astype(np.int64) - other)))
        independent.append(mcnemar(k * int((one & ~other).sum()), k * int((other & ~one).sum())))
    assert np.mean(np.array(found) < 0.05) < 0.08
    assert np.mean(np.array(independent) < 0.05) > 0.1  # what the groups are for


def test_flips_of_imagenets_validation_set_are_exact():
    """5,000 groups of ten, all of which change, far out in the tail, where an FFT would give its rounding."""
    differences = np.random.RandomState(0).randint(-10, 11, 5000) + 1
    spread = np.sqrt((differences.astype(float) ** 2).sum())
    expected = 2 * stats.norm.sf((abs(differences.sum()) - 0.5) / spread)
    assert 1e-60 < expected < 1e-20
    assert np.log(sign_flip(differences)) == pytest.approx(np.log(expected), rel=0.02)


def test_the_interval_of_a_mean_is_student_s():
    values = [61.2, 60.1, 63.9, 61.0]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert mean_interval([61.2]) is None


def test_holms_values_are_those_worked_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01; 2 x 0.03; not below the one before
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == pytest.approx([0.02])
