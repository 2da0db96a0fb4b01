"""The sign-flip test written out, in fractions."""

from collections import defaultdict
from fractions import Fraction

import numpy as np


def flipped(one: np.ndarray, other: np.ndarray, k: int) -> float:
    """p of one, other: bool (n,), in an order of which k after one another are a group."""
    return p_of([int(one[i : i + k].sum()) - int(other[i : i + k].sum()) for i in range(0, len(one), k)])


def p_of(differences: list[int]) -> float:
    sums = {0: Fraction(1)}
    for difference in differences:
        wider: dict[int, Fraction] = defaultdict(Fraction)
        for total, probability in sums.items():
            wider[total + difference] += probability / 2
            wider[total - difference] += probability / 2
        sums = wider
    return float(sum(p for total, p in sums.items() if abs(total) >= abs(sum(differences))))
