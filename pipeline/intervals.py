"""How sure a count is: intervals of shares and means, and whether two models differ on the same pictures.

By hand, since the smallest GPU environment has no scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054  # of the normal distribution at 97.5 %


class Interval(NamedTuple):
    low: float
    high: float


def wilson(correct: int, of: int) -> Interval:
    """The 95 % interval of a share (Wilson, 1927). Errors: ValueError where nothing was counted."""
    if not 0 <= correct <= of or of < 1:
        raise ValueError(f"{correct} of {of}: no share has an interval")
    share, wide = correct / of, _Z * _Z / of
    middle = (share + wide / 2) / (1 + wide)
    half = _Z / (1 + wide) * math.sqrt(share * (1 - share) / of + wide / (4 * of))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % interval of a mean over seeds, by Student's t. None where there are fewer than two."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = _t_quantile(len(values) - 1) * math.sqrt(variance / len(values))
    return Interval(mean - half, mean + half)


def _t_quantile(freedom: int) -> float:
    """Below which 97.5 % of Student's t lies."""
    low, high = 0.0, 13.0  # that of one degree of freedom, the largest, is 12.71
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 0.95 else (low, middle)
    return high


def _t_within(t: float, freedom: int) -> float:
    """P(|T| < t), the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    terms = [term] if freedom > 1 else []
    for i in range(3 if odd else 2, freedom - 1, 2):
        term *= (i - 1) / i * math.cos(angle) ** 2
        terms.append(term)
    series = math.sin(angle) * math.fsum(terms)
    return 2 / math.pi * (angle + series) if odd else series


def holm(p_values: Sequence[float]) -> list[float]:
    """The same in their order, adjusted for all being asked at once, however they depend on each other (Holm, 1979)."""
    adjusted, largest = list(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def sign_flip(differences: np.ndarray) -> float:
    """The exact two-sided p-value that two models are equally good, where answers hang together in groups.

    differences: int (groups,), how many more pictures of a group one model has right than the other. If both are
    equally good each is as likely with the other sign, so the sum of all is compared with what every flip of the signs
    gives (Fisher, 1935). Of groups of one picture this is McNemar's test. 1.0 where nothing differs.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    total = abs(int(differences.sum()))
    sums = np.ones(1)  # probabilities of -highest to highest, in ones
    for size, count in sorted(
        zip(sizes.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1]
    ):  # cheapest so
        # `heads` of `count` signs are positive: the sum moves by size * (2 heads - count).
        wider = np.zeros(len(sums) + 2 * size * count)
        for heads, probability in enumerate(_binomial(count)):
            if probability > 0:
                wider[2 * size * heads : 2 * size * heads + len(sums)] += probability * sums
        sums = wider
    return min(1.0, 2 * float(sums[len(sums) // 2 + total :].sum())) if total else 1.0


def _binomial(n: int) -> np.ndarray:
    """Of 0 to n heads of n coins, in logarithms first: 2^-50,000 is no float."""
    logs = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(n + 1)])
    return np.exp(logs - n * math.log(2))


def mcnemar(only_one: int, only_other: int) -> float:
    """The exact two-sided p-value that two models are equally good (McNemar, 1947), from where they differ.

    only_one, only_other: pictures that one of them alone answers rightly. 1.0 where there are none.
    """
    n, fewer = only_one + only_other, min(only_one, only_other)
    if n == 0:
        return 1.0
    # Binomial(n, 1/2) up to `fewer`, in logarithms: 2^-50,000 is no float.
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(fewer + 1)
    ]
    top = max(logs)
    return min(1.0, 2 * math.exp(top) * math.fsum(math.exp(value - top) for value in logs))
