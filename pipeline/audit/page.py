"""audit.html: one file, its plot inside, nothing from the network."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pipeline.audit.findings import Audit
from pipeline.audit.plot import draw_accuracies
from pipeline.audit.table import HEADER, NOTES, groups_of, remarks
from pipeline.page import render_page
from pipeline.page.drawing import plot_uris

_TEMPLATE = Path(__file__).parent / "templates" / "audit.html.j2"


def page_of(audit: Audit) -> str:
    return render_page(
        _TEMPLATE,
        {},
        audit=audit,
        findings=audit.verdict,
        header=HEADER,
        groups=groups_of(audit.rows),
        notes=[*NOTES, *remarks(audit.rows)],
        published=audit.beside_published(),
        plot_of_k=plot_uris(partial(draw_accuracies, audit.rows)),
        facts=audit.facts(),
    )
