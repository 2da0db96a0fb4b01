"""audit.md: the same table and verdict as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pipeline.audit.findings import Audit
from pipeline.audit.table import HEADER, NOTES, groups_of, remarks


def markdown_of(audit: Audit) -> str:
    return "\n".join(_blocks(audit)) + "\n"


def _blocks(audit: Audit) -> Iterator[str]:
    yield f"# Audit of {escaped(audit.model)}\n"
    yield from (f"- {escaped(finding.words)}" for finding in audit.verdict)
    yield ""
    for group in groups_of(audit.rows):
        yield f"### {escaped(group.heading)}\n"
        yield _row(("#", *HEADER))
        yield _row(("---:", "---", *("---" if name == "order" else "---:" for name in HEADER[1:])))
        for line in group.lines:
            mark = "**" if line.number == 1 else ""
            yield _row((str(line.number), f"{mark}{line.name}{mark}", *line.cells))
        yield ""
    yield from (f"{escaped(note)}\n" for note in (*NOTES, *remarks(audit.rows)))
    if audit.published is not None:
        yield "## Published, and here\n"
        yield _row(("top-1 %", "published", "here"))
        yield _row(("---", "---:", "---:"))
        for name, given, own in audit.beside_published():
            yield _row((name, f"{given:.2f} (published)", "not run" if own is None else f"{own:.2f}"))
        yield ""
    yield "## What it was found of\n"
    yield from (f"- {name}: {escaped(value)}" for name, value in audit.facts())
    yield f"\n```\n{audit.command}\n```"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """As Markdown shows it letter by letter: sites have stars, paths anything."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", text)
