"""report.md: the same tables for those who read text; its plots are SVG files in a folder beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.report.blocks import Block, Section
from benchmarks.report.results import Source

PLOTS = "report-plots"


def table(header: Sequence[str], lines: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """A GitHub-flavoured table; numeric: columns that end at the right."""
    rules = ["---:" if right else "---" for right in numeric]
    return "\n".join("|".join(["", *map(_cell, line), ""]) for line in (header, rules, *lines))


def picture(name: str, words: str) -> str:
    """A plot's files are called `name`, with -light.svg and -dark.svg after it. words: for who cannot see it."""
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{name}-dark.svg">'
    return f'<picture>{source}<img src="{name}-light.svg" alt="{_attribute(words)}"></picture>'


def render_markdown(sections: Sequence[Section], title: str, plots: dict[int, str]) -> str:
    """plots: id of a block -> name of its plot's files, to which -light.svg and -dark.svg are added."""
    parts = [f"# {title}", *(part for section in sections for part in _section(section, plots))]
    return "\n\n".join(parts) + "\n"


def _section(section: Section, plots: dict[int, str]) -> Iterator[str]:
    yield f"## {section.title}"
    if section.asked:
        yield section.asked
    numbers = {source: number for number, source in enumerate(section.sources, 1)}
    for group in section.groups:
        if group.variant:
            yield f"### {_plain(group.variant)}"
        for block in group.blocks:
            yield from _block(block, numbers, plots.get(id(block)))
        if group.set_up:
            yield "**Set up as**"
            yield "\n".join(f"- {name}: {_plain(how)}" for name, how in group.set_up)
    yield "**Runs**"
    yield "\n".join(
        f"{number}. {_code(source.command)}: {_plain(source.circumstances)}" for source, number in numbers.items()
    )
    if section.superseded:
        yield "**Superseded by newer ones, not shown**"
        yield "\n".join(
            f"- {count} results of {_code(source.command)}: {source.when}; {source.hardware}; {source.code}"
            for source, count in section.superseded
        )


def _block(block: Block, numbers: dict[Source, int], plot: str | None) -> Iterator[str]:
    yield f"#### {block.title}"
    if block.words:
        yield _plain(block.words)
    if block.plot is not None and plot is not None:
        yield picture(f"{PLOTS}/{plot}", block.plot.words)
    lines = [
        [f"**{cell}**" if cell and i in block.own and not c else cell for c, cell in enumerate(line)]
        for i, line in enumerate(block.lines)
    ]
    yield table(block.header, lines, block.numeric)
    yield "\n".join(f"- Run {numbers[source]}: {_code(source.command)}" for source in block.sources)


def _code(text: str) -> str:
    """Between more backticks than the text has."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}"


def _plain(text: str) -> str:
    """What would begin a tag is shown."""
    return text.replace("<", "&lt;")


def _cell(text: str) -> str:
    text = _plain(text)
    text = " ".join(text.replace("|", "\\|").split())
    return f" {text} " if text else " "


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
