"""The rows as text: one table for each noise, the same on the terminal, in Markdown and on the page."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console

from pipeline.audit.findings import PUBLISHED_OF, Audit
from pipeline.audit.rows import Row, per_image, points_over, signed

HEADER = ("protocol", "k", "top-1 %", "95 % interval", "difference", "order", "class mates %", "n")
NOTES = (
    "k: pictures in a group. Every figure with k above 1 is transductive: a picture's answer hangs on the others of "
    "its group. Difference: points over the model per image.",
    "Intervals are Wilson's, which takes answers as independent; those of one group are not, so of transductive rows "
    "they are too narrow. Over several shuffled orders they are Student's t of the mean: what the order does to these "
    "pictures, not which pictures they are. p is exact and heeds groups: the signs of whole groups' differences are "
    "flipped; for pictures on their own that is McNemar's test.",
    "7: the share of pictures that are answered as their mates' class, in brackets that of the same pictures with the "
    "noise off. 8: the mean over batches of the accuracy so far, which weighs the first classes most; it is no "
    "accuracy of a set of pictures. 9: the clean twin's own top-1 per image.",
)
NOISE_OFF = "Noise off"
_SHORT = ("protocol", "k", "top-1 %", "95 % interval", "points", "mates", "n")  # the terminal's: 80 columns hold them


class Line(NamedTuple):
    """One row of the table."""

    number: int
    name: str
    noise: str
    """Empty where the noise is off."""
    cells: tuple[str, ...]
    """As HEADER, without the protocol."""
    transductive: bool


class Group(NamedTuple):
    """The lines of one noise."""

    heading: str
    lines: list[Line]


def lines_of(rows: Sequence[Row]) -> list[Line]:
    plain = per_image(rows)
    return [Line(row.protocol, row.name, row.noise or "", _cells(row, plain), row.transductive) for row in rows]


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """The protocols without noise (1, 6 and 9), then those of each noise."""
    lines = lines_of(rows)
    noises = dict.fromkeys(["", *(line.noise for line in lines)])
    return [Group(noise or NOISE_OFF, [line for line in lines if line.noise == noise]) for noise in noises]


def _cells(row: Row, plain: Row) -> tuple[str, ...]:
    order = f"{row.order} x {len(row.counts)}" if len(row.counts) > 1 else row.order
    mates = "" if row.class_mates is None else f"{100 * row.class_mates:.1f}"
    if row.value is None:
        return str(row.k), "not run", "", "", order, mates, ""
    over = "" if row.protocol == 1 or row.measure == "answered_b" else signed(points_over(row, plain))
    return str(row.k), _value(row), _interval(row), over, order, mates, f"{row.n:,}"


def _value(row: Row) -> str:
    value = f"{100 * (row.value or 0):.2f}"
    return value if row.beside is None else f"{value} ({100 * row.beside / row.n:.2f})"


def _interval(row: Row) -> str:
    if row.interval is None:
        return ""
    low, high = (100 * end for end in row.interval)
    return f"{low:.2f} to {high:.2f}"


def remarks(rows: Iterable[Row]) -> list[str]:
    """What is to be said of single rows, each sentence once, with all protocols and k that it is of."""
    places: dict[str, dict[int, list[int]]] = {}  # remark -> k -> protocols
    for row in rows:
        if row.remark:
            of_k = places.setdefault(row.remark, {}).setdefault(row.k, [])
            of_k += [row.protocol] if row.protocol not in of_k else []
    found = []
    for remark, by_k in places.items():
        ks: dict[tuple[int, ...], list[int]] = {}
        for k, protocols in by_k.items():
            ks.setdefault(tuple(protocols), []).append(k)
        where = "; ".join(f"{_listed(protocols)}, k = {_listed(of)}" for protocols, of in ks.items())
        found.append(f"{where}: {remark}.")
    return found


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def print_audit(audit: Audit) -> None:
    """The table, what stands beside it, and the verdict."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    console.print(f"audit of {audit.model}\n")
    for text, style in terminal_lines(audit.rows):
        console.print(text, style=style, soft_wrap=True)
    console.print()
    for sentence in (*NOTES, *remarks(audit.rows)):
        console.print(sentence)
    for name, given, own in audit.beside_published():
        console.print(f"{name}: {given:.2f} % published, {'not run' if own is None else f'{own:.2f} %'} here")
    if audit.published is not None:
        console.print(f"Published: {PUBLISHED_OF}")
    console.print("\nVerdict")
    for finding in audit.verdict:
        console.print(f"- {finding.words}")
    console.print(f"\nWritten: {audit.output}/audit.json, audit.md, audit.html", soft_wrap=True)


def terminal_lines(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """(text, style): a heading and lines for each noise, in columns that are the same for all and cut no figure."""
    groups = groups_of(rows)
    cells = {id(line): _short(line) for group in groups for line in group.lines}
    table = [("#", *_SHORT), *cells.values()]
    widths = [max(len(row[column]) for row in table) for column in range(len(_SHORT) + 1)]

    def text(row: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if number == 1 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    yield text(table[0]), "dim"
    for group in groups:
        yield group.heading, "underline"
        yield from ((text(cells[id(line)]), "bold" if line.number == 1 else "") for line in group.lines)


def _short(line: Line) -> tuple[str, ...]:
    """Without the order, which the protocol's name says, but for how many there were."""
    k, value, interval, over, order, mates, n = line.cells
    _, times, number = order.partition(" x ")
    return str(line.number), f"{line.name}{times}{number}", k, value, interval, over, mates, n
