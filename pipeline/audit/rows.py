"""What one protocol found: counts first, so that every figure can be formed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.intervals import Interval, mean_interval, wilson
from pipeline.sections import to_json

NAMES = {
    1: "noise off",
    2: "k = 1",
    3: "class order",
    4: "shuffled",
    5: "one of each class",
    6: "plain voting",
    7: "one a among b",
    8: "official figure",
    9: "clean twin",
}

Measure = Literal["top1", "answered_b", "running_mean"]


@dataclass(frozen=True)
class Row:
    """One line of the table. All shares lie from 0 to 1."""

    protocol: int
    """1 to 9, as PAPER.md counts them."""
    name: str
    k: int
    """Pictures in a group; 1 where each is on its own."""
    order: str
    """`any` where no answer hangs on it."""
    noise: str | None = None
    """NoiseConfig.describe(), k left out; None: noise off."""
    site: str | None = None
    transductive: bool = False
    """Whether another picture could have changed an answer."""
    measure: Measure = "top1"
    """`answered_b`: the share of victims answered as their mates' class. `running_mean`: no accuracy of a set."""
    counts: tuple[int, ...] = ()
    """Of the pictures that the measure asks for, one for each seed; empty where nothing was counted."""
    n: int = 0
    """Pictures that each count is of."""
    beside: int | None = None
    """Of victims: how many of the same are answered so with the noise off."""
    figure: float | None = None
    """Of `running_mean`, which is no count."""
    class_mates: float | None = None
    """Mean share of a picture's group mates that are of its class; over seeds the mean."""
    differing: int | None = None
    """Pictures answered otherwise than with the noise off: of k = 1, where there must be none."""
    p: float | None = None
    """That it is as good as the model per image on the same pictures, two-sided and exact: by flipping the signs of
    whole groups (intervals.sign_flip; with k = 1, and for the twin, McNemar's test). Of victims: that the noise changes
    nothing, by McNemar's test. None over several seeds."""
    seed_ps: tuple[float, ...] = ()
    """Of shuffled orders: p of each seed."""
    p_voting: float | None = None
    """Of class order: that plain voting over the same groups (protocol 6) is as good, as p."""
    unlike: str = ""
    """Of the clean twin: what else its training differs in."""
    remark: str = ""
    """Why it was not run, or what else is to be said."""

    @property
    def was_run(self) -> bool:
        return bool(self.counts) or self.figure is not None

    @property
    def values(self) -> tuple[float, ...]:
        """One for each seed."""
        return tuple(count / self.n for count in self.counts)

    @property
    def value(self) -> float | None:
        """The share, over seeds their mean; None where it was not run."""
        return sum(self.counts) / (self.n * len(self.counts)) if self.counts else self.figure

    @property
    def interval(self) -> Interval | None:
        """95 %: Wilson's of one count, Student's t of a mean over seeds.

        Wilson's takes answers as independent, which those of one group are not: of transductive rows it is too narrow.
        Student's is over orders of these pictures; which pictures they are is not in it.
        """
        if len(self.counts) == 1:
            return wilson(self.counts[0], self.n)
        found = mean_interval(self.values)
        return found and Interval(max(0.0, found.low), min(1.0, found.high))  # a t interval of shares may leave 0 to 1

    @property
    def beside_interval(self) -> Interval | None:
        """Wilson's."""
        return None if self.beside is None else wilson(self.beside, self.n)

    @property
    def spread(self) -> tuple[float, float] | None:
        """The lowest and the highest of several seeds."""
        return (min(self.values), max(self.values)) if len(self.counts) > 1 else None

    def to_json(self) -> dict[str, Any]:
        formed = ("values", "value", "interval", "beside_interval", "spread")
        return to_json(self) | {name: to_json(getattr(self, name)) for name in formed}


def per_image(rows: Sequence[Row]) -> Row:
    """Protocol 1, the headline."""
    return next(row for row in rows if row.protocol == 1)


def points_over(row: Row, plain: Row) -> float:
    """How much more than `plain` it has, in points (percent of the pictures)."""
    assert row.value is not None and plain.value is not None
    return 100 * (row.value - plain.value)


def signed(points: float) -> str:
    """Two digits, and no sign of what rounds to 0."""
    return "0.00" if abs(points) < 0.005 else f"{points:+.2f}"


def in_words(p: float | None) -> str:
    """A p-value."""
    if p is None:
        return "unknown"
    if p < 1e-300:
        return "below 1e-300"
    return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def faults(rows: Sequence[Row]) -> list[str]:
    """Why no transductive figure may be used: a noise that at k = 1 is not the identity to the last picture."""
    return [
        f"FAULT: {row.noise}: at k = 1 {row.differing} of {row.n} answers differ from those with the noise off"
        for row in rows
        if row.protocol == 2 and row.differing
    ]
