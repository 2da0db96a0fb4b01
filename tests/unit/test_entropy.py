"""dS in closed form against what is written out or drawn; measured information against truths that are known."""

import math

import numpy as np
import pytest
import torch

from pipeline.noise import entropy
from pipeline.noise.config import NoiseConfig
from pipeline.noise.reference import apply_noise

KS = [1, 2, 3, 10, 50]


def written_out(kind: str, alpha: float, k: int) -> np.ndarray:
    """I + Q of k samples, float64 (k, k)."""
    if kind == "optimal_q":
        return (np.eye(k) + np.ones((k, k))) / (k + 1) if k > 1 else np.eye(1)
    return (1 - alpha) * np.eye(k) + alpha * np.roll(np.eye(k), 1, axis=1)


# ---- dS by definition ----


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("alpha", [0.0, 1e-9, 0.1, 0.3, 0.4, 0.4999])
def test_circular_shift_is_the_determinant_of_the_written_out_matrix(alpha, k):
    sign, log = np.linalg.slogdet(written_out("circular_shift", alpha, k))
    assert sign == 1
    # Near 0.5 and for even k the matrix is nearly singular: its smallest pivot loses digits, not the closed form.
    assert entropy.circular_shift_change(alpha, k) == pytest.approx(-log, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("k", KS)
def test_optimal_q_is_the_determinant_of_the_written_out_matrix(k):
    assert entropy.optimal_q_change(k) == pytest.approx(
        -np.linalg.slogdet(written_out("optimal_q", 0, k))[1], rel=1e-12
    )


@pytest.mark.parametrize(("kind", "alpha"), [("circular_shift", 0.3), ("optimal_q", None)])
@pytest.mark.parametrize("k", KS)
def test_the_written_out_matrix_is_what_the_noise_does(kind, alpha, k):
    """The identity goes in as k samples of k features: what comes out is I + Q."""
    config = NoiseConfig(kind, alpha, site="x", group_size=k)
    found = apply_noise(torch.eye(k, dtype=torch.float64), config, torch.arange(k), 0, torch.tensor(0))
    np.testing.assert_allclose(found.numpy(), written_out(kind, alpha or 0, k), atol=1e-15)


@pytest.mark.parametrize("k", [10**4, 10**4 + 1, 10**7])
def test_no_power_is_formed_for_large_groups(k):
    assert entropy.circular_shift_change(0.3, k) == pytest.approx(-k * math.log(0.7), rel=1e-12)
    assert entropy.optimal_q_change(k) == (k - 1) * math.log(k + 1)


def test_near_one_half_the_digits_stay():
    """det = (1-a)^2 - a^2 = 1 - 2a, exactly."""
    alpha = 0.5 - 2.0**-40
    assert entropy.circular_shift_change(alpha, 2) == pytest.approx(39 * math.log(2), rel=1e-12)


def test_positive_is_above_zero_and_nothing_else():
    assert entropy.is_positive(entropy.optimal_q_change(2)) and entropy.is_positive(1e-300)
    for change in (
        entropy.optimal_q_change(1),
        entropy.circular_shift_change(0.4, 1),
        entropy.circular_shift_change(0.0, 7),
        entropy.gaussian_scalar_change(0.0, 1.0, 1.0, 0.5),
        entropy.salt_and_pepper_change(0.0),
        entropy.salt_and_pepper_change(0.3),
    ):
        assert not entropy.is_positive(change)


@pytest.mark.parametrize("k", [1, 2, 10])
def test_halving_the_features_would_be_positive(k):
    assert entropy.scaling_change(0.5, k) == pytest.approx(-np.linalg.slogdet(0.5 * np.eye(k))[1])
    assert entropy.is_positive(entropy.scaling_change(0.5, k))


def test_gaussian_scalar_case_is_the_general_one():
    joint = np.array([[2.0, 0.7], [0.7, 1.5]])
    noisy = joint + np.diag([0.3, 0.0])
    expected = 0.5 * (np.linalg.slogdet(joint)[1] - np.linalg.slogdet(noisy)[1])
    assert entropy.gaussian_scalar_change(0.3, 2.0, 1.5, 0.7) == pytest.approx(expected, rel=1e-12)
    assert entropy.gaussian_change(joint, 1, 0.3) == pytest.approx(expected, rel=1e-12)


def joint_covariance(size: int, seed: int) -> np.ndarray:
    root = np.random.RandomState(seed).randn(size, size)
    return root @ root.T + 0.2 * np.eye(size)


def test_gaussian_case_is_the_quotient_of_determinants():
    joint = joint_covariance(9, seed=0)
    noisy = joint + np.diag([0.4] * 6 + [0.0] * 3)
    expected = 0.5 * (np.linalg.slogdet(joint)[1] - np.linalg.slogdet(noisy)[1])
    assert entropy.gaussian_change(joint, 6, 0.4) == pytest.approx(expected, rel=1e-10)
    assert entropy.gaussian_change(torch.from_numpy(joint), 6, 0.4) == entropy.gaussian_change(joint, 6, 0.4)


def test_gaussian_case_where_the_labels_are_redundant():
    """A label variable written down twice makes |S_(Z,Y)| zero, and tells nothing new."""
    joint = joint_covariance(5, seed=1)
    twice = joint[np.ix_([0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 4])]
    assert entropy.gaussian_change(twice, 4, 0.4) == pytest.approx(entropy.gaussian_change(joint, 4, 0.4), rel=1e-9)


def test_gaussian_case_in_many_dimensions_does_not_overflow():
    size = 3000
    joint = np.diag(np.full(size + 1, 1e-3))
    assert entropy.gaussian_change(joint, size, 1e-3) == pytest.approx(-0.5 * size * math.log(2))


def test_gaussian_case_against_monte_carlo():
    """H(Y;Z) - H(Y;Z+e), each entropy the mean of -log density over draws with real noise added."""
    joint, features, std, draws = joint_covariance(4, seed=2), 3, 0.8, 200_000
    rng = np.random.RandomState(3)
    zy = rng.multivariate_normal(np.zeros(4), joint, draws)
    noisy = zy.copy()
    noisy[:, :features] += std * rng.randn(draws, features)

    def minus_log_density(x: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        quadratic = np.einsum("ni,ij,nj->n", x, np.linalg.inv(covariance), x)
        return 0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1])

    added = np.diag([std**2] * features + [0.0])
    drawn = minus_log_density(zy, joint) - minus_log_density(noisy, joint + added)
    error = drawn.std() / math.sqrt(draws)
    assert abs(entropy.gaussian_change(joint, features, std**2) - drawn.mean()) < 5 * error < 0.05


@pytest.mark.parametrize("probability", [0.05, 0.3, 2 / 3, 0.9, 1.0])
def test_salt_and_pepper_entropy_against_counts(probability):
    """The noise itself on zeros, with extremes -1 and 1: what is left, salt and pepper are counted."""
    x, ids = torch.zeros(4, 100_000), torch.arange(4)
    extremes = -torch.ones(()), torch.ones(())
    config = NoiseConfig("salt_and_pepper", probability)
    noisy = apply_noise(x, config, ids, 5, torch.tensor(0), extremes=extremes)
    shares = torch.stack([(noisy == value).double().mean() for value in (-1, 0, 1)]).numpy()
    shares = shares[shares > 0]
    n, found = x.numel(), -(shares * np.log(shares)).sum()
    error = math.sqrt(max((shares * np.log(shares) ** 2).sum() - found**2, 0) / n)  # of a plug-in entropy, and
    bias = len(shares) / n  # where all are equally likely only its bias, of second order, is left
    assert abs(entropy.salt_and_pepper_entropy(probability) - found) < 5 * (error + bias)
    assert entropy.salt_and_pepper_change(probability) == -entropy.salt_and_pepper_entropy(probability)


def test_salt_and_pepper_entropy_at_its_ends():
    assert entropy.salt_and_pepper_entropy(0.0) == 0.0
    assert entropy.salt_and_pepper_entropy(1.0) == pytest.approx(math.log(2))
    assert entropy.salt_and_pepper_entropy(2 / 3) == pytest.approx(math.log(3))


# ---- what is measured ----


def mixture(per_class: int, classes: int, features: int, spread: float, seed: int):
    """Gaussian classes of unit covariance: features (n, d), labels (n,), and I(Y;Z) by a million draws, to 0.002."""
    rng = np.random.RandomState(seed)
    means = spread * rng.randn(classes, features)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(classes), count)
        return means[labels] + rng.randn(len(labels), features), labels

    many, many_labels = draw(200_000 // classes)
    scores = torch.from_numpy(many @ means.T - 0.5 * (means**2).sum(1)).log_softmax(1).numpy()
    truth = math.log(classes) + scores[np.arange(len(many)), many_labels].mean()
    return (*draw(per_class), truth)


@pytest.mark.parametrize(
    ("per_class", "classes", "features", "spread"),
    [(1000, 2, 1, 0.8), (200, 5, 4, 0.6), (40, 10, 10, 0.5), (10, 10, 5, 1.0), (4, 10, 4, 1.0)],
)
def test_the_estimate_recovers_a_known_information(per_class, classes, features, spread):
    """The last has as many features as samples of a class, the most that most_axes allows: the bias is large there."""
    hits, seeds = 0, range(6)
    for seed in seeds:
        x, y, truth = mixture(per_class, classes, features, spread, seed)
        found = entropy.mutual_information(x, y, seed=seed)
        assert 0 <= found.low <= found.nats <= found.high <= math.log(classes) + 1e-12
        hits += found.low - 0.005 < truth < found.high + 0.005
    assert hits >= len(seeds) - 1


def test_no_information_is_measured_as_none():
    rng = np.random.RandomState(0)
    found = entropy.mutual_information(rng.randn(600, 5), np.arange(600) % 3)
    assert found.low == 0 and found.nats < 0.02
    assert entropy.probe_bound(rng.randn(600, 5), np.arange(600) % 3).nats < 0.02


@pytest.mark.parametrize("seed", range(4))
def test_the_probe_is_below_the_truth(seed):
    x, y, truth = mixture(300, 5, 6, 0.6, seed)
    found = entropy.probe_bound(x, y, seed=seed)
    assert 0.6 * truth < found.nats < found.high and found.low < truth
    assert found.nats < truth + (found.high - found.nats)


def test_both_are_below_the_truth_where_classes_are_not_gaussian():
    """Two rings: Y is known from Z to the last bit, and neither a line nor Gaussian classes can see it."""
    rng = np.random.RandomState(0)
    angle, y = 2 * math.pi * rng.rand(2000), np.arange(2000) % 2
    x = (1.0 + y)[:, None] * np.stack((np.cos(angle), np.sin(angle)), axis=1)
    assert entropy.mutual_information(x, y).high < 0.1 < math.log(2)
    assert entropy.probe_bound(x, y).high < 0.1


def test_scale_and_invertible_maps_change_neither():
    """Halving the features is 'positive' by definition; nothing is measured of it."""
    x, y, _ = mixture(60, 4, 3, 0.8, seed=1)
    assert entropy.mutual_information(0.5 * x, y) == entropy.mutual_information(x, y)
    assert entropy.probe_bound(0.5 * x, y) == entropy.probe_bound(x, y)
    change = entropy.information_change(x, 0.5 * x, y)[2]
    assert (change.nats, change.low, change.high) == (0, 0, 0)
    mapped = x @ np.random.RandomState(0).randn(3, 3) + 7
    assert entropy.mutual_information(mapped, y).nats == pytest.approx(entropy.mutual_information(x, y).nats, abs=1e-9)


def test_the_same_for_tensors_and_any_labels_and_from_the_same_seed():
    x, y, _ = mixture(60, 4, 3, 0.8, seed=1)
    one = entropy.mutual_information(x, y, seed=3)
    assert entropy.mutual_information(torch.from_numpy(x), torch.from_numpy(10 * y - 5), seed=3) == one
    assert entropy.mutual_information(x, y, seed=4) != one


def test_a_change_is_measured_more_closely_in_pairs():
    x, y, _ = mixture(100, 4, 3, 0.8, seed=2)
    noisy = x + 0.3 * np.random.RandomState(1).randn(*x.shape)
    clean, with_noise, change = entropy.information_change(x, noisy, y)
    assert clean == entropy.mutual_information(x, y) and with_noise == entropy.mutual_information(noisy, y)
    assert change.nats == pytest.approx(with_noise.nats - clean.nats) and change.high < 0
    assert change.high - change.low < 0.7 * (clean.high - clean.low)


def test_mixed_samples_are_not_counted_as_independent():
    """Groups of ten that are copies of one sample: the interval must be that of the tenth part."""
    x, y, _ = mixture(20, 4, 2, 0.6, seed=3)
    copies, labels, groups = np.repeat(x, 10, axis=0), np.repeat(y, 10), np.repeat(np.arange(len(y)), 10)
    honest = entropy.mutual_information(copies, labels, groups)
    naive = entropy.mutual_information(copies, labels)
    single = entropy.mutual_information(x, y)
    assert honest.high - honest.low > 2 * (naive.high - naive.low)
    assert honest.high - honest.low == pytest.approx(single.high - single.low, rel=0.3)
    bound, naive_bound = entropy.probe_bound(copies, labels, groups), entropy.probe_bound(copies, labels)
    assert bound.high - bound.low > 2 * (naive_bound.high - naive_bound.low)


def test_principal_axes_are_orthonormal_and_leave_out_what_is_constant():
    x = np.random.RandomState(0).randn(50, 4) * [3, 1, 0, 2]
    axes = entropy.principal_axes(x, most=10)
    assert axes.shape == (4, 3)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert np.abs(axes[:, 0]).argmax() == 0 and entropy.principal_axes(x, 2).shape == (4, 2)


@pytest.mark.parametrize(("groups", "classes", "most"), [(4, 2, 1), (6, 3, 2), (40, 10, 4), (5000, 1000, 5)])
def test_as_many_axes_as_can_be_measured(groups, classes, most):
    assert entropy.most_axes(groups, classes) == most
    entropy.mutual_information(np.random.RandomState(0).randn(groups, most), np.arange(groups) % classes)


# ---- bad input ----


@pytest.mark.parametrize("alpha", [-0.1, 0.5, 1.0, float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*from 0 to below 0\.5"):
        entropy.circular_shift_change(alpha, 3)


@pytest.mark.parametrize("k", [0, -2])
def test_k_out_of_range(k):
    for call in (
        lambda: entropy.circular_shift_change(0.3, k),
        lambda: entropy.optimal_q_change(k),
        lambda: entropy.scaling_change(0.5, k),
    ):
        with pytest.raises(ValueError, match=f"k is {k}: .*at least 1"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropy.scaling_change(0.0, 2), "factor is 0"),
        (lambda: entropy.salt_and_pepper_entropy(1.1), "probability is 1.1.*from 0 to 1"),
        (lambda: entropy.gaussian_scalar_change(-1.0, 1.0, 1.0, 0.0), "noise_variance is -1.*at least 0"),
        (lambda: entropy.gaussian_scalar_change(0.1, 1.0, 1.0, 1.0), "determine each other"),
        (lambda: entropy.gaussian_change(np.ones((2, 3)), 1, 0.1), "square"),
        (lambda: entropy.gaussian_change(np.array([[1.0, 0.5], [0.0, 1.0]]), 1, 0.1), "not symmetric"),
        (lambda: entropy.gaussian_change(np.eye(3), 4, 0.1), "num_features is 4: from 1 to the 3"),
        (lambda: entropy.gaussian_change(np.ones((2, 2)), 1, 0.1), "Y determines a feature"),
        (lambda: entropy.principal_axes(np.ones((5, 2)), 2), "same for all samples"),
        (lambda: entropy.principal_axes(np.eye(5), 0), "most is 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def measures():
    return (
        entropy.mutual_information,
        entropy.probe_bound,
        lambda x, y: entropy.information_change(x, x, y),
        entropy.covariance_of,
    )


@pytest.mark.parametrize("measure", measures())
def test_samples_that_cannot_be_measured_are_refused(measure):
    x, y = np.random.RandomState(0).randn(20, 3), np.arange(20) % 2
    for value in (np.nan, np.inf):
        bad = x.copy()
        bad[7, 1] = value
        with pytest.raises(ValueError, match="features of sample 7 are not finite: leave it out"):
            measure(bad, y)
    with pytest.raises(ValueError, match="all 20 samples are of one class: give samples of two"):
        measure(x, np.zeros(20, int))
    with pytest.raises(ValueError, match=r"20 independent samples .* of 20 classes.*at least two a class"):
        measure(x, np.arange(20))
    with pytest.raises(ValueError, match="3 of them are too many for 5 independent samples of 2 classes: keep 2"):
        measure(x[:5], y[:5])
    with pytest.raises(ValueError, match=r"\(n, d\), \(n,\) and \(n,\)"):
        measure(x, y[:-1])
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        measure(x[:, 0], y)


def test_groups_that_are_too_few_are_refused():
    x, y = np.random.RandomState(0).randn(40, 2), np.arange(40) // 20
    with pytest.raises(ValueError, match=r"2 independent samples .*smaller groups"):
        entropy.mutual_information(x, y, groups=np.arange(40) // 20)


def test_features_that_depend_on_each_other_are_refused():
    x, y = np.random.RandomState(0).randn(40, 2), np.arange(40) % 2
    with pytest.raises(ValueError, match=r"depend on each other.*keep fewer axes"):
        entropy.mutual_information(np.concatenate((x, x), axis=1), y)
