"""Entropy change of a noise by the paper's definition, in closed form, and the information that can be measured.

Source: NoisyNN (arXiv 2309.10625), its sections on task entropy and on the noise types; PAPER.md section 4. The entropy
change dS = H(Y;Z) - H(Y;Z+e) keeps the clean H(Z); a noise is positive where dS > 0 and harmful where dS <= 0. That is
a definition, not a measurement: for a linear noise it depends on Q alone. So the mutual information I(Y;Z) of labels
and features is estimated too, with intervals. All entropies and informations are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from scipy import stats
from torch import Tensor

Array: TypeAlias = np.ndarray | Tensor

CONFIDENCE = 0.95
_FOLDS = 20  # deletions of the jackknife: enough for an interval by t, and 21 fits at most
_SCORE_ENTRIES = 1 << 24  # 128 MB of float64 at a time, where there are many samples and many classes


@dataclass(frozen=True)
class Interval:
    """A measurement in nats and its interval of 95 %."""

    nats: float
    low: float
    high: float

    def within(self, low: float, high: float) -> Interval:
        """The same where the truth is known to lie between low and high."""
        return Interval(*(min(max(value, low), high) for value in (self.nats, self.low, self.high)))


# ---- dS by definition ----


def is_positive(entropy_change_nats: float) -> bool:
    """Positive noise has dS > 0; with dS = 0 it is harmful (PAPER.md, section 4)."""
    return entropy_change_nats > 0


def circular_shift_change(alpha: float, k: int) -> float:
    """dS = -log|det(I + Q)| in nats, of a group of k samples, for each feature: det = (1-a)^k - (-a)^k.

    alpha: from 0 to below 0.5; k: at least 1. Source: PAPER.md, section 4. Errors: ValueError for values outside.
    The powers are never formed: at k = 10,000 both would be 0.
    """
    if not 0 <= alpha < 0.5:
        raise ValueError(f"alpha is {alpha}: for a circular shift it is from 0 to below 0.5")
    _check_k(k)
    if k == 1 or alpha == 0:  # a sample mixed with itself, or not at all: exactly 0, so that it is not called positive
        return 0.0
    # log(a / (1-a)); near 0.5 the quotient is near 1 and its logarithm would lose its digits.
    log_ratio = math.log1p((2 * alpha - 1) / (1 - alpha)) if alpha > 0.25 else math.log(alpha / (1 - alpha))
    rest = math.log1p(math.exp(k * log_ratio)) if k % 2 else math.log(-math.expm1(k * log_ratio))
    return -(k * math.log1p(-alpha) + rest)


def optimal_q_change(k: int) -> float:
    """dS = (k-1) log(k+1) in nats, of a group of k samples, for each feature: det(I + Q) = (k+1)^-(k-1).

    Source: PAPER.md, section 4 (the maximum under the paper's constraints). Errors: ValueError for k below 1.
    """
    _check_k(k)
    return (k - 1) * math.log(k + 1)


def scaling_change(factor: float, k: int) -> float:
    """dS in nats of multiplying a group's features by a factor: `I + Q = factor I`, for each feature. No noise at all.

    Errors: ValueError for a factor that is not above 0 and finite, or k below 1.
    """
    _check_k(k)
    if not 0 < factor < math.inf:
        raise ValueError(f"factor is {factor}: give a finite number above 0")
    return -k * math.log(factor)


def gaussian_scalar_change(noise_variance: float, z_variance: float, y_variance: float, covariance: float) -> float:
    """dS = -1/2 log(1 + se^2 sy^2 / (sz^2 sy^2 - cov^2)) in nats, for jointly Gaussian scalars Z and Y.

    Source: PAPER.md, section 4. Never above 0. Errors: ValueError for a negative variance, or where Z and Y determine
    each other.
    """
    _check_noise_variance(noise_variance)
    determinant = z_variance * y_variance - covariance**2
    if not (z_variance > 0 and y_variance > 0 and determinant > 0):
        raise ValueError(
            f"covariance {covariance} with variances {z_variance} and {y_variance}: Z and Y determine each other, or "
            "one is constant; give a covariance below the root of the product of two variances above 0"
        )
    return -0.5 * math.log1p(noise_variance * y_variance / determinant)


def gaussian_change(joint_covariance: Array, num_features: int, noise_variance: float) -> float:
    """dS = 1/2 log(|S_(Z,Y)| / |S_(Z+e,Y)|) in nats, for jointly Gaussian Z and Y and white noise on Z.

    joint_covariance: (d + c, d + c) of d = num_features features, then c label variables; Y's part may be singular.
    noise_variance: of each feature. Source: PAPER.md, section 4. Since |S_(Z,Y)| = |S_Y| |S_(Z given Y)|, this is
    -1/2 sum log(1 + se^2 / l) over the eigenvalues l of S_(Z given Y): no determinant is formed.
    Errors: ValueError for a matrix that is not square, symmetric, finite, or where Y determines a feature.
    """
    _check_noise_variance(noise_variance)
    joint = _float64(joint_covariance)
    if joint.ndim != 2 or joint.shape[0] != joint.shape[1] or not np.isfinite(joint).all():
        raise ValueError(f"joint_covariance {joint.shape}: give a square matrix of finite numbers")
    if not np.allclose(joint, joint.T):
        raise ValueError("joint_covariance is not symmetric: give a covariance")
    if not 1 <= num_features <= len(joint):
        raise ValueError(f"num_features is {num_features}: from 1 to the {len(joint)} rows of joint_covariance")
    z, y, zy = (
        joint[:num_features, :num_features],
        joint[num_features:, num_features:],
        joint[:num_features, num_features:],
    )
    given_y = z - zy @ np.linalg.pinv(y, hermitian=True) @ zy.T
    eigenvalues = np.linalg.eigvalsh(given_y)
    if eigenvalues[0] <= 1e-12 * max(eigenvalues[-1], np.diag(z).max(), 1e-300):
        raise ValueError("joint_covariance: Y determines a feature, or one is constant: leave that feature out")
    return float(-0.5 * np.log1p(noise_variance / eigenvalues).sum())


def salt_and_pepper_entropy(probability: float) -> float:
    """H(e) in nats of each entry: salt with probability p/2, pepper with p/2, left alone with 1 - p.

    H(e) = -p log(p/2) - (1-p) log(1-p): the entropy of that ternary choice, which the entry's value does not enter.
    At most log 3, at p = 2/3. Errors: ValueError for a probability outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability is {probability}: for salt-and-pepper it is from 0 to 1")
    replaced = probability * math.log(probability / 2) if probability > 0 else 0.0
    kept = (1 - probability) * math.log1p(-probability) if probability < 1 else 0.0
    return -(replaced + kept)


def salt_and_pepper_change(probability: float) -> float:
    """dS = -H(e) in nats of each entry; never above 0 (PAPER.md, section 4). Errors: as salt_and_pepper_entropy."""
    return -salt_and_pepper_entropy(probability)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}: a group holds at least 1 sample")


def _check_noise_variance(noise_variance: float) -> None:
    if not 0 <= noise_variance < math.inf:
        raise ValueError(f"noise_variance is {noise_variance}: give a finite number, at least 0")


# ---- what can be measured ----


def label_entropy(labels: Array) -> float:
    """H(Y) in nats at the labels' own frequencies; labels: int (n,)."""
    counts = np.unique(_numpy(labels), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def covariance_of(features: Array, labels: Array) -> np.ndarray:
    """Covariance of features (n, d) and of the labels' indicators (the last class follows from the others).

    Returns (d + c - 1, d + c - 1) for c classes, as gaussian_change takes it. Errors: as mutual_information.
    """
    x, y, _ = _checked(features, labels, None)
    indicators = np.eye(y.max() + 1)[y][:, :-1]
    return np.cov(np.concatenate((x, indicators), axis=1), rowvar=False)


def principal_axes(features: Array, most: int) -> np.ndarray:
    """The orthonormal axes of largest variance, (d, m) with m <= most; axes without variance are left out.

    Orthonormal, so that white noise stays white and as strong. Errors: ValueError for features that do not vary.
    """
    x = _float64(features)
    if most < 1:
        raise ValueError(f"most is {most}: keep at least 1 axis")
    if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all():
        raise ValueError(f"features {x.shape}: give finite (n, d) of at least 2 samples")
    variances, axes = np.linalg.eigh(np.atleast_2d(np.cov(x, rowvar=False)))
    varying = int((variances > 1e-10 * variances[-1]).sum()) if variances[-1] > 0 else 0
    if varying == 0:
        raise ValueError("features are the same for all samples: choose another site")
    return axes[:, ::-1][:, : min(most, varying)]


def most_axes(num_groups: int, num_classes: int) -> int:
    """How many features can be measured with so many independent samples.

    Each class mean has as many unknowns as there are features, so there must be as many samples of a class: with
    fewer, the jackknife no longer takes away the estimate's bias (with so many it does: tests/unit/test_entropy.py).
    """
    return max(1, min(num_groups // num_classes, num_groups - num_classes - 1))


def mutual_information(features: Array, labels: Array, groups: Array | None = None, seed: int = 0) -> Interval:
    """I(Y;Z) in nats, estimated with Gaussian classes of one covariance: mean of log p(y given z) / p(y).

    features: (n, d); labels: int (n,); groups: int (n,), equal for samples that were mixed and so are not independent.
    Exact for such classes as n grows; for any others below the truth, since it is H(Y) less a cross-entropy. Invariant
    under invertible linear maps of the features. Bias and interval (95 %, by t): delete-a-group jackknife, 20 folds
    of whole groups, drawn by the seed (Efron and Stein, "The jackknife estimate of variance", Ann. Statist. 1981).
    Errors: ValueError for features that are not finite or too many, one class only, fewer than two groups a class.
    """
    x, y, g = _checked(features, labels, groups)
    parts = _jackknife_parts(_standardised(x), y, _folds(y, g, min(_FOLDS, g.max() + 1), seed))
    return _jackknife(parts).within(0.0, label_entropy(y))


def information_change(
    clean: Array, noisy: Array, labels: Array, groups: Array | None = None, seed: int = 0
) -> tuple[Interval, Interval, Interval]:
    """I(Y;Z), I(Y;Z+e) and their difference, noisy less clean, in nats; row i of clean and noisy is the same sample.

    The difference is jackknifed in pairs: both lose the same samples, so what they share does not widen its interval.
    Shapes, method and errors: as mutual_information.
    """
    x, y, g = _checked(clean, labels, groups)
    x_noisy = _checked(noisy, labels, groups)[0]
    folds = _folds(y, g, min(_FOLDS, g.max() + 1), seed)
    before, after = (_jackknife_parts(_standardised(z), y, folds) for z in (x, x_noisy))
    most = label_entropy(y)
    return _jackknife(before).within(0, most), _jackknife(after).within(0, most), _jackknife(after - before)


def probe_bound(features: Array, labels: Array, groups: Array | None = None, seed: int = 0) -> Interval:
    """A lower bound of I(Y;Z) in nats: H(Y) less the cross-entropy of a linear probe on the half it has not seen.

    features: (n, d); labels: int (n,); groups: int (n,), never split between the halves. The probe is a logistic
    regression on features brought to unit variance, so that their scale does not matter. Whatever the probe, its
    expected cross-entropy is at least H(Y given Z). The interval (95 %, by t) is over held-out groups, of this probe.
    Errors: as mutual_information.
    """
    from sklearn.linear_model import LogisticRegression

    x, y, g = _checked(features, labels, groups)
    x, held_out = _standardised(x), _folds(y, g, 2, seed) == 1
    if len(np.unique(y[~held_out])) < 2:
        raise ValueError("labels: the probe's half holds one class only: give more samples of each class")
    probe = LogisticRegression(max_iter=1000).fit(x[~held_out], y[~held_out])
    # Mixed with the classes' shares: a class that this half lacks must not cost infinitely many nats.
    other = 1 / (~held_out).sum()
    shares = np.bincount(y) / len(y)
    predicted = np.zeros((held_out.sum(), len(shares)))
    predicted[:, probe.classes_] = probe.predict_proba(x[held_out])
    predicted = (1 - other) * predicted + other * shares
    costs = -np.log(predicted[np.arange(len(predicted)), y[held_out]])
    mean, error, count = _clustered_mean(costs, g[held_out])
    entropy, reach = label_entropy(y), _t(count) * error
    return Interval(entropy - mean, entropy - mean - reach, entropy - mean + reach).within(0.0, entropy)


def _numpy(values: Array) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _float64(values: Array) -> np.ndarray:
    return _numpy(values.double() if isinstance(values, Tensor) else values).astype(np.float64)


def _checked(features: Array, labels: Array, groups: Array | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features float64 (n, d), labels 0 to c - 1, groups 0 to g - 1; refuses what cannot be measured."""
    x, y = _float64(features), _numpy(labels)
    g = np.arange(len(x)) if groups is None else _numpy(groups)
    if x.ndim != 2 or x.shape[1] < 1 or y.shape != (len(x),) or g.shape != (len(x),):
        raise ValueError(f"features {x.shape}, labels {y.shape}, groups {g.shape}: give (n, d), (n,) and (n,)")
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
        raise ValueError(f"features of sample {row} are not finite: leave it out, or mend the model that made them")
    y, g = np.unique(y, return_inverse=True)[1], np.unique(g, return_inverse=True)[1]
    num_classes, num_groups = len(np.unique(y)), len(np.unique(g))
    if num_classes < 2:
        raise ValueError(f"labels: all {len(y)} samples are of one class: give samples of two classes at least")
    if num_groups < 2 * num_classes:
        raise ValueError(
            f"labels: {num_groups} independent samples (groups) of {num_classes} classes cannot be measured: give at "
            "least two a class, by more samples or by smaller groups"
        )
    if x.shape[1] >= num_groups - num_classes:
        raise ValueError(
            f"features: {x.shape[1]} of them are too many for {num_groups} independent samples of {num_classes} "
            f"classes: keep {most_axes(num_groups, num_classes)} (principal_axes), or give more samples"
        )
    return x, y, g


def _standardised(x: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 in each column, so that no threshold or penalty depends on the features' scale."""
    spread = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1.0)


def _folds(labels: np.ndarray, groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Fold 0 to count - 1 of each sample, (n,): whole groups, each class spread evenly as far as groups allow."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    random = np.random.RandomState(seed & 0xFFFFFFFF).random_sample(len(first))
    fold = np.empty(len(first), np.int64)
    fold[np.lexsort((random, labels[first]))] = np.arange(len(first)) % count
    return fold[inverse]


def _jackknife_parts(x: np.ndarray, y: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """The plain estimate from all samples, then without each fold in turn, (folds + 1,)."""
    without = [_gaussian_classes(x[folds != fold], y[folds != fold]) for fold in range(folds.max() + 1)]
    return np.array([_gaussian_classes(x, y), *without])


def _jackknife(parts: np.ndarray) -> Interval:
    whole, without = parts[0], parts[1:]
    count = len(without)
    estimate = count * whole - (count - 1) * without.mean()
    reach = _t(count) * math.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    return Interval(float(estimate), float(estimate - reach), float(estimate + reach))


def _gaussian_classes(x: np.ndarray, y: np.ndarray) -> float:
    """Mean of log p(y given z) / p(y) in nats, with classes fitted to these very samples (so: too high by a bias)."""
    present, y = np.unique(y, return_inverse=True)
    shares = np.bincount(y) / len(y)
    means = np.stack([x[y == label].mean(axis=0) for label in range(len(present))])
    residuals = x - means[y]
    try:
        root = np.linalg.cholesky(residuals.T @ residuals / (len(x) - len(present)))
        if np.diag(root).min() < 1e-6:
            raise np.linalg.LinAlgError
    except np.linalg.LinAlgError as error:
        raise ValueError("features depend on each other or do not vary within classes: keep fewer axes") from error
    z, w = np.linalg.solve(root, x.T).T, np.linalg.solve(root, means.T).T
    offset = np.log(shares) - 0.5 * (w**2).sum(axis=1)
    total, rows = 0.0, max(1, _SCORE_ENTRIES // len(present))
    for start in range(0, len(x), rows):
        label = y[start : start + rows]
        scores = torch.from_numpy(z[start : start + rows] @ w.T + offset)
        total += float(scores.log_softmax(dim=1)[torch.arange(len(label)), torch.from_numpy(label)].sum())
    return total / len(x) + label_entropy(y)


def _clustered_mean(values: np.ndarray, groups: np.ndarray) -> tuple[float, float, int]:
    """Mean, its standard error where the values of a group are not independent, and the number of groups."""
    inverse = np.unique(groups, return_inverse=True)[1]
    sums = np.bincount(inverse, values - values.mean())
    count = len(sums)
    return float(values.mean()), math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(values), count


def _t(count: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
