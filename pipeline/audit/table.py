"""The rows as text: one table, the same on the terminal, in Markdown and on the page."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.audit.findings import Audit
from pipeline.audit.rows import Row, per_image

HEADER = ("protocol", "k", "order", "class mates %", "top-1 %", "95 % interval", "n", "difference")
NOTES = (
    "k: pictures in a group. Every figure with k above 1 is transductive: a picture's answer hangs on the others of "
    "its group. Intervals are Wilson's, or Student's t over shuffled orders; they take answers as independent, which "
    "those of one group are not, so transductive ones are too narrow. Difference: points over the model per image.",
    "7: the share of pictures that are answered as their mates' class, in brackets that of the same pictures with the "
    "noise off. 8: the mean over batches of the accuracy so far, which weighs the first classes most; it is no "
    "accuracy of a set of pictures. 9: the clean twin's own top-1 per image.",
)


class Line(NamedTuple):
    """One row of the table."""

    number: int
    name: str
    noise: str
    """Empty where the noise is off."""
    cells: tuple[str, ...]
    """k, order, class mates, value, interval, n, difference."""
    transductive: bool


def lines_of(rows: Sequence[Row]) -> list[Line]:
    plain = per_image(rows)
    return [Line(row.protocol, row.name, row.noise or "", _cells(row, plain), row.transductive) for row in rows]


def _cells(row: Row, plain: Row) -> tuple[str, ...]:
    order = f"{row.order} x {len(row.counts)}" if len(row.counts) > 1 else row.order
    mates = "" if row.class_mates is None else f"{100 * row.class_mates:.1f}"
    if row.value is None:
        return str(row.k), order, mates, "not run", "", "", ""
    over = "" if row.protocol == 1 or row.measure == "answered_b" else f"{100 * (row.value - (plain.value or 0)):+.2f}"
    return str(row.k), order, mates, _value(row), _interval(row), f"{row.n:,}", over


def _value(row: Row) -> str:
    value = f"{100 * (row.value or 0):.2f}"
    return value if row.beside is None else f"{value} ({100 * row.beside / row.n:.2f})"


def _interval(row: Row) -> str:
    if row.interval is None:
        return ""
    low, high = (100 * end for end in row.interval)
    return f"{low:.2f} to {high:.2f}"


def remarks(rows: Iterable[Row]) -> list[str]:
    """What is to be said of single rows, each sentence once."""
    return [*dict.fromkeys(f"{row.protocol}, k = {row.k}: {row.remark}." for row in rows if row.remark)]


def print_audit(audit: Audit) -> None:
    """The table, what stands beside it, and the verdict."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    lines = lines_of(audit.rows)
    named = dict.fromkeys(line.noise for line in lines if line.noise)
    noises = {noise: f"N{number}" for number, noise in enumerate(named, start=1)}
    several = len(noises) > 1
    table = Table(title=f"audit of {audit.model}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("#", justify="right")
    for name in (HEADER[0], *(("noise",) if several else ()), *HEADER[1:]):
        table.add_column(name, justify="left" if name in ("protocol", "noise", "order") else "right")
    for line in lines:
        noise = (noises.get(line.noise, ""),) if several else ()
        table.add_row(str(line.number), line.name, *noise, *line.cells, style="bold" if line.number == 1 else "")
    console.print(table)
    for text, name in noises.items():
        console.print(f"{name if several else 'Noise'}: {text}")
    for sentence in (*NOTES, *remarks(audit.rows)):
        console.print(sentence)
    for name, given, own in audit.beside_published():
        console.print(f"{name}: {given:.2f} % published, {'not run' if own is None else f'{own:.2f} %'} here")
    console.print("\nVerdict")
    for finding in audit.verdict:
        console.print(f"- {finding.words}")
    console.print(f"\nWritten: {audit.output}/audit.json, audit.md, audit.html", soft_wrap=True)
