"""The aims of `python -m benchmarks noise`, as noise.py states them with their reasons, and whether each is met.

A row keeps the aims that hold for it, so that whoever reads it later judges by what was stated when it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from benchmarks.harness import Row, Spread, ratio

CARD, DTYPE, MEGABYTES = "NVIDIA H200", "bfloat16", 1000
FOR = f"one {CARD}, {DTYPE}, {MEGABYTES:,} MB"
TITLE = f"aims, set before a GPU was at hand ({FOR})"
HEADER = ("part", "what", "measured", "aim", "")


class Aim(NamedTuple):
    """Of one contestant beside another of its part, turn by turn."""

    over: str
    """The other contestant."""
    quantity: Literal["rate", "time"]
    limit: float
    """A rate's ratio is to be at least, a time's at most so much."""

    @property
    def words(self) -> str:
        return f"at {'least' if self.quantity == 'rate' else 'most'} {self.limit:g}"

    def missed_by(self, median: float) -> float:
        """A share of the aim; 0 where it is met."""
        short = 1 - median / self.limit if self.quantity == "rate" else median / self.limit - 1
        return max(0.0, short)


# By (part, contestant).
AIMS = {
    ("gaussian", "operator"): (Aim("copy", "rate", 0.85), Aim("torch.compile", "rate", 2.2), Aim("eager", "rate", 4.0)),
    ("circular_shift", "operator"): (Aim("copy", "rate", 0.9),),
    ("optimal_q", "operator"): (Aim("copy", "rate", 0.9),),
    ("image_noise, gaussian", "operator"): (Aim("copy", "rate", 0.75),),
    ("norm_noise, gaussian", "operator"): (Aim("LayerNorm alone", "time", 1.1),),
    ("norm_noise, optimal_q", "operator"): (Aim("LayerNorm alone", "time", 1.1),),
    ("model, forward and back", "gaussian"): (Aim("none", "time", 1.01),),
    ("model, forward and back", "optimal_q"): (Aim("none", "time", 1.01),),
}


class Judged(NamedTuple):
    part: str
    contestant: str
    aim: Aim
    measured: Spread

    @property
    def verdict(self) -> str:
        missed = self.aim.missed_by(self.measured.median)
        return f"NOT met, by {100 * missed:.1f} %" if missed else "met"


def stated(part: str, contestant: str, marks: dict[str, Any]) -> dict[str, Any]:
    """What a row keeps of the aims; nothing where none was stated for it. marks: its conditions and environment."""
    conditions = marks["conditions"]
    measured_on = (marks["environment"]["device"], conditions["device"], conditions["dtype"], conditions["megabytes"])
    aims = AIMS.get((part, contestant))
    if aims is None or measured_on != (CARD, "cuda", DTYPE, MEGABYTES):
        return {}
    return {"aims": [aim._asdict() for aim in aims]}


def aims_of(row: dict[str, Any]) -> tuple[Aim, ...]:
    """What a row has kept. Errors: ValueError for an aim that is none."""
    try:
        aims = tuple(Aim(**kept) for kept in row.get("aims", ()))
        for aim in aims:
            if aim.quantity not in ("rate", "time") or isinstance(aim.limit, bool) or not 0 < aim.limit < math.inf:
                raise TypeError(f"{aim.quantity} {aim.limit}")
    except TypeError as error:
        raise ValueError(f"aims: {error}") from error
    return aims


def judged(rows: Sequence[tuple[Row, Sequence[Aim]]]) -> Iterator[Judged]:
    """Every aim whose two sides are among the rows, in their order."""
    by_name = {(row.part, row.contestant): row for row, _ in rows}
    for own, aims in rows:
        for aim in aims:
            if (other := by_name.get((own.part, aim.over))) is not None:
                measured = ratio(own, other) if aim.quantity == "rate" else ratio(other, own)
                yield Judged(own.part, own.contestant, aim, measured)


def aims_table(rows: Sequence[tuple[Row, Sequence[Aim]]]) -> list[list[str]]:
    """A line for each aim, under HEADER."""
    return [
        [
            one.part,
            f"{one.contestant}'s {one.aim.quantity} over {one.aim.over}'s",
            decimals(one.measured),
            one.aim.words,
            one.verdict,
        ]
        for one in judged(rows)
    ]


def decimals(value: Spread) -> str:
    """A ratio so that one per cent of it is seen."""
    return f"{value.median:.3f} ({value.min:.3f} to {value.max:.3f})"
