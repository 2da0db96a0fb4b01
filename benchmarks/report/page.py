"""report.html: one file, its plots inside, nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.blocks import Section
from pipeline.page import render_page

_TEMPLATE = Path(__file__).parent / "templates" / "benchmarks.html.j2"


def render_html(sections: Sequence[Section], title: str, uris: dict[int, dict[str, str]]) -> str:
    """uris: id of a block -> its plot by mode."""
    return render_page(_TEMPLATE, {}, title=title, sections=sections, uris=uris, id=id)
