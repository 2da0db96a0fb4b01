"""audit.md: the same table and verdict as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.audit.findings import Audit
from pipeline.audit.table import HEADER, NOTES, lines_of, remarks


def markdown_of(audit: Audit) -> str:
    return "\n".join(_blocks(audit)) + "\n"


def _blocks(audit: Audit) -> Iterator[str]:
    yield f"# Audit of {audit.model}\n"
    yield from (f"- {finding.words}" for finding in audit.verdict)
    yield ""
    lines = lines_of(audit.rows)
    yield _row(("#", HEADER[0], "noise", *HEADER[1:]))
    yield _row(("---:", "---", "---", "---:", "---", *["---:"] * 5))
    for line in lines:
        mark = "**" if line.number == 1 else ""
        yield _row((str(line.number), f"{mark}{line.name}{mark}", line.noise, *line.cells))
    yield ""
    yield from (f"{note}\n" for note in (*NOTES, *remarks(audit.rows)))
    if audit.published is not None:
        yield "## Published, and here\n"
        yield _row(("top-1 %", "published", "here"))
        yield _row(("---", "---:", "---:"))
        for name, given, own in audit.beside_published():
            yield _row((name, f"{given:.2f} (published)", "not run" if own is None else f"{own:.2f}"))
        yield ""
    yield "## What it was found of\n"
    yield from (f"- {name}: {value}" for name, value in audit.facts())
    yield f"\n```\n{audit.command}\n```"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
