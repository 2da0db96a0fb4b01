"""`python -m benchmarks report`: every result with its plot, its spread, what it ran on and its command, in one page.

report.html holds its plots; report.md is the same as text, with the plots beside it. README.md's measured figures are
made by the same functions (readme.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.report.results import Result, read_results
from data_prep.manifest import atomic_file

_TITLE = "NoisyNN at scale: measurements"


@dataclass(frozen=True)
class ReportOptions:
    """Writes report.html and report.md of everything that was measured; nothing is measured, nothing fetched."""

    results: Path = RESULTS
    """Folder with the *.jsonl of the other questions."""
    output: Path = Path("runs/report")
    """Folder that gets report.html, report.md and its plots."""
    runs: tuple[Path, ...] = ()
    """Run folders of `python -m pipeline train` to be shown too."""
    latest: bool = False
    """Of each table the newest result and those that compare with it, where results of several runs do not."""
    readme: Path | None = None
    """A README whose figures are to be written anew: what stands between `<!-- figures: ... -->` and `<!-- end -->`."""


def write_report(options: ReportOptions, command: Sequence[str]) -> list[Any]:
    """Reads, writes and says what it wrote. Errors: ValueError, OSError naming the file and the mend."""
    from benchmarks.report.questions import sections_of

    results = read_results(options.results)
    if not results and not options.runs:
        raise ValueError(
            f"--results {options.results} holds no *.jsonl: measure first, such as `python -m benchmarks noise`"
        )
    sections = sections_of(results, options.latest)
    if options.runs:
        from benchmarks.report.runs import runs_section

        sections.append(runs_section(options.runs))
    if options.readme is not None:
        _refresh(options.readme, results, options)
    _write_pages(sections, options.output)
    older = sum(count for section in sections for _, count in section.superseded)
    print(f"{len(results)} results, {older} of them superseded: {options.output / 'report.html'}, report.md")
    return []


def _refresh(readme: Path, results: Sequence[Result], options: ReportOptions) -> None:
    """The README's figures, and their plots beside the results."""
    from benchmarks.report.readme import PLOTS, refreshed
    from pipeline.page.drawing import THEMES, svg_text

    plots = Path(os.path.relpath(options.results, readme.parent)).as_posix()
    text = refreshed(readme.read_text(encoding="utf-8"), results, options.latest, str(readme), plots)
    for name, draw in PLOTS.items():
        if f"{plots}/{name}-light.svg" in text:
            for mode, theme in THEMES.items():
                _write(options.results / f"{name}-{mode}.svg", svg_text(partial(draw, results, options.latest), theme))
    _write(readme, text)
    print(f"{readme}: its figures are those of {options.results}")


def _write_pages(sections: Sequence[Any], folder: Path) -> None:
    from benchmarks.report.markdown import PLOTS, render_markdown
    from benchmarks.report.page import render_html
    from pipeline.page.drawing import THEMES, svg_text, svg_uri

    names: dict[int, str] = {}
    plots: dict[int, dict[str, str]] = {}
    for section in sections:
        blocks = [block for group in section.groups for block in group.blocks if block.plot is not None]
        for number, block in enumerate(blocks, 1):
            names[id(block)] = f"{section.name}-{number}"
            plots[id(block)] = {mode: svg_text(block.plot.draw, theme) for mode, theme in THEMES.items()}
    uris = {block: {mode: svg_uri(svg) for mode, svg in modes.items()} for block, modes in plots.items()}
    page, text = render_html(sections, _TITLE, uris), render_markdown(sections, _TITLE, names)
    (folder / PLOTS).mkdir(parents=True, exist_ok=True)
    for block_id, modes in plots.items():
        for mode, svg in modes.items():
            _write(folder / PLOTS / f"{names[block_id]}-{mode}.svg", svg)
    _write(folder / "report.md", text)
    _write(folder / "report.html", page)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
