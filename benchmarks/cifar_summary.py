"""The table of a CIFAR-10 run, the headline first, and one sentence that says which part of a gain is transductive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.cifar_audit import GROUP, OFFICIAL, RESIDUAL
from benchmarks.harness import print_table

CLEAN, NOISY = "clean", "noisy"
PER_IMAGE, ALONE, CLASS_ORDER, SHUFFLED, ONE_OF_EACH, VOTE = range(1, 7)  # of pipeline.audit's protocols
_PLACES = {OFFICIAL: "official place", RESIDUAL: "residual stream, all tokens"}
_ORDERS = {CLASS_ORDER: "class order", SHUFFLED: "shuffled", ONE_OF_EACH: "one of each class"}
# The table's lines: (protocol, place).
SHOWN: dict[tuple[int, str | None], str] = {
    (PER_IMAGE, None): "per image, noise off",
    **{
        (number, place): f"optimal Q, {text}, {of}" for place, text in _PLACES.items() for number, of in _ORDERS.items()
    },
    (VOTE, None): "no noise, logits averaged, class order",
}

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Parting:
    """What a class-ordered figure of the noisy twin is made of: top-1 in percent, one for each seed."""

    place: str
    class_mate_share: float
    clean: tuple[float, ...]
    """The clean twin, per image."""
    alone: tuple[float, ...]
    """The noisy twin, per image."""
    ordered: tuple[float, ...]
    """The noisy twin with optimal Q at inference, class order."""
    shuffled: tuple[float, ...]
    """The same, shuffled."""

    @property
    def gain(self) -> float:
        """Over the clean twin per image; the sum of the two below."""
        return fmean(self.ordered) - fmean(self.clean)

    @property
    def from_training(self) -> float:
        """What a picture on its own gets too."""
        return fmean(self.alone) - fmean(self.clean)

    @property
    def transductive(self) -> float:
        """What needs the other pictures of the group."""
        return fmean(self.ordered) - fmean(self.alone)

    def sentence(self) -> str:
        what = f"Optimal Q at inference ({_PLACES[self.place]}, k = {GROUP}, class order)"
        figures = f"{what} has {fmean(self.ordered):.2f} %, the clean twin per image {fmean(self.clean):.2f} %"
        if self.gain <= 0:
            return f"{figures}: there is no gain to divide."
        if self.transductive <= 0:
            return f"{figures}: of this gain nothing is transductive; {self._per_image()}."
        share = f"all {self.gain:.2f} points" if self.from_training <= 0 else f"{self.transductive:.2f} of the "
        share += "" if self.from_training <= 0 else f"{self.gain:.2f} points"
        return (
            f"{figures}: of this gain {share} are transductive, from the {GROUP - 1} others of a group, of which "
            f"{100 * self.class_mate_share:.1f} % are of the picture's class (shuffled: {fmean(self.shuffled):.2f} %); "
            f"{self._per_image()}."
        )

    def _per_image(self) -> str:
        each = [alone - clean for alone, clean in zip(self.alone, self.clean, strict=True)]
        spread = "one seed"
        if len(each) > 1:
            spread = f"{min(each):+.2f} to {max(each):+.2f} over {len(each)} seeds"
            spread += ": not told apart from 0" if min(each) <= 0 <= max(each) else ""
        return f"training with noise gave {self.from_training:+.2f} points per image ({spread})"


def part(rows: Rows) -> Parting | None:
    """Of the place whose class-ordered mean is highest, over the seeds that have both twins. None: there is no such."""
    by_twin = {twin: {row["seed"]: row for row in rows if row["contestant"] == twin} for twin in (CLEAN, NOISY)}
    seeds = sorted(by_twin[CLEAN].keys() & by_twin[NOISY].keys())
    if not seeds:
        return None
    clean, noisy = ([by_twin[twin][seed] for seed in seeds] for twin in (CLEAN, NOISY))
    partings = [
        Parting(
            place=place,
            class_mate_share=_found(noisy[0], CLASS_ORDER, place)["class_mates"],
            clean=_top1(clean, PER_IMAGE),
            alone=_top1(noisy, PER_IMAGE),
            ordered=_top1(noisy, CLASS_ORDER, place),
            shuffled=_top1(noisy, SHUFFLED, place),
        )
        for place in _PLACES
    ]
    return max(partings, key=lambda parting: fmean(parting.ordered))


def _found(row: dict[str, Any], protocol: int, place: str | None = None) -> dict[str, Any]:
    """One row of the audit, as pipeline.audit's Row has it."""
    return next(
        found
        for found in row["audit"]
        if found["protocol"] == protocol and (place is None or row["places"][found["site"]] == place)
    )


def _top1(rows: Rows, protocol: int, place: str | None = None) -> tuple[float, ...]:
    """Percent, one for each row."""
    return tuple(100 * _found(row, protocol, place)["value"] for row in rows)


def tell_cell(row: dict[str, Any]) -> None:
    print(f"{row['part']}, {row['contestant']}: {_with_interval(row)} per image, noise off")


def _with_interval(row: dict[str, Any]) -> str:
    found = _found(row, PER_IMAGE)
    low, high = (100 * end for end in found["interval"])
    count = f"{found['counts'][0]:,} of {found['n']:,}"
    return f"{100 * found['value']:.2f} % ({count}; 95 %: {low:.2f} to {high:.2f})"


def print_summary(rows: Rows) -> None:
    """rows: of every (seed, twin) that is done."""
    print_table(*summary_table(rows))
    for row in rows:
        tell_cell(row)
    print(identity(rows))
    print("every line with class mates is transductive: a picture's answer hangs on the others of its group")
    parting = part(rows)
    print("no seed has both twins yet: no gain to divide" if parting is None else parting.sentence())


def summary_table(rows: Rows) -> tuple[str, list[str], list[list[str]]]:
    """(title, header, a line for each protocol and twin)."""
    lines = []
    for (protocol, where), label in SHOWN.items():
        for twin in (CLEAN, NOISY):
            if of_twin := [row for row in rows if row["contestant"] == twin]:
                lines.append([label, twin, *_cells(of_twin, protocol, where)])
    noises = ", ".join({row["conditions"]["noise"]: None for row in rows if row["contestant"] == NOISY})
    header = ["evaluated", "twin", "k", "class mates", "seeds", "top-1 %, mean (lowest to highest)"]
    return f"cifar: clean, and trained with {noises or 'noise (not yet)'}", header, lines


def _cells(rows: Rows, protocol: int, place: str | None) -> list[str]:
    top1, first = _top1(rows, protocol, place), _found(rows[0], protocol, place)
    share = first["class_mates"]
    return [
        str(first["k"]),
        "" if share is None else f"{100 * share:.1f} %",
        str(len(top1)),
        f"{fmean(top1):.2f} ({min(top1):.2f} to {max(top1):.2f})",
    ]


def identity(rows: Rows) -> str:
    """Optimal Q at k = 1 is the identity: where it is not, the code is at fault and the figures are not to be used."""
    wrong = [
        f"{row['part']}, {row['contestant']}, {place}: {count} answers differ"
        for row in rows
        for place in row["places"].values()
        if (count := _found(row, ALONE, place)["differing"])
    ]
    if wrong:
        return f"FAULT: k = 1 is not noise off ({'; '.join(wrong)}): do not use the transductive figures"
    return "k = 1 equals noise off to the last picture, in every training and at both places"
