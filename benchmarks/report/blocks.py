"""What a report is made of: a section for each question, in it a block for each table with its plot and its runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.harness import Row, Spread, figure, table_of, unit_of_time
from benchmarks.report.plots import Bar, draw_bars
from benchmarks.report.results import ALIKE, Alike, Result, Source, check_alike, sources_of
from pipeline.page.drawing import Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Theme], "Figure"]
_NO_FIGURES = {
    "question",
    "part",
    "conditions",
    "cell",
    "code",
    "timings",
    "environment",
    "note",
    "command",
    "time_utc",
}
_NO_FIGURES |= {"uncommitted_changes", "load_average_1_minute"}


@dataclass(frozen=True)
class Plot:
    draw: Draw
    words: str
    """What it shows, for those who cannot see it."""
    large: bool = False
    """Drawn for a whole column: on a phone it scrolls, as in a run's report."""


@dataclass(frozen=True)
class Block:
    """A table, the plot above it, and the runs that its figures are of."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    sources: tuple[Source, ...]
    words: str = ""
    """Read before the table."""
    plot: Plot | None = None
    own: frozenset[int] = frozenset()
    """Indices of the lines that are this project's."""
    set_up: Sequence[tuple[str, str]] = ()
    """(contestant, how it was set up and where that choice comes from)."""

    def __post_init__(self) -> None:
        assert all(len(line) == len(self.header) for line in self.lines), self.title

    @property
    def numeric(self) -> list[bool]:
        """By column: whether its cells are figures, and end at the right."""
        columns = list(zip(*self.lines, strict=True)) or [()] * len(self.header)
        return [
            i > 0 and all(not cell or cell[0].isdigit() or cell[0] in "+-" for cell in c) for i, c in enumerate(columns)
        ]


class Group(NamedTuple):
    """Blocks of one variant of a measurement."""

    variant: str
    blocks: Sequence[Block]

    @property
    def set_up(self) -> list[tuple[str, str]]:
        """(contestant, how it was set up), each once; where that differs between blocks, with the block's title."""
        titles: dict[tuple[str, str], list[str]] = {}
        for block in self.blocks:
            for pair in block.set_up:
                titles.setdefault(pair, []).append(block.title)
        ways = Counter(name for name, _ in titles)
        return [
            (name if ways[name] == 1 else f"{name} ({'; '.join(where)})", how) for (name, how), where in titles.items()
        ]


@dataclass(frozen=True)
class Section:
    """A question with all that was found."""

    name: str
    title: str
    asked: str
    groups: Sequence[Group]
    superseded: Sequence[tuple[Source, int]] = ()
    """Older runs, and how many of their results are not shown."""

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(
            dict.fromkeys(source for group in self.groups for block in group.blocks for source in block.sources)
        )


def block_of(
    results: Sequence[Result],
    title: str,
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    alike: Alike = ALIKE,
    **more: Any,
) -> Block:
    """A block of results that compare; of several runs each line says when it was measured.

    Lines that are no means are of one result each, in their order. Errors: those of check_alike.
    """
    check_alike(results, alike)
    sources = sources_of(results)
    if len(sources) > 1 and not alike.means and len(lines) == len(results):
        header = [*header, "measured"]
        lines = [[*line, result.source.when] for line, result in zip(lines, results, strict=True)]
    return Block(title, header, lines, sources, **more)


# ---- what every question's rows have in common ----


def timed_block(
    results: Sequence[Result],
    title: str,
    own: Callable[[str], bool] = lambda name: False,
    labels: dict[str, str] | None = None,
    ranked: bool = False,
    words: str = "",
) -> Block:
    """Of one part's rows of `harness.summarise`. own: whether a contestant is this project's; ranked: by rate."""
    timed = [(result, result.timed) for result in results]
    if ranked:
        timed.sort(key=lambda pair: -pair[1].items_per_second.median)
    results, names = [result for result, _ in timed], [row.contestant for _, row in timed]
    shown = [replace(row, contestant=(labels or {}).get(row.contestant, row.contestant)) for _, row in timed]
    header, lines = table_of(shown)
    compared = shown[0].compared_with
    header[-1] = f"rate over {(labels or {}).get(compared, compared)}'s"
    for line, row in zip(lines, shown, strict=True):
        line.insert(1, str(row.n))
    shared = {row.settings for row in shown}
    return block_of(
        results,
        title,
        [header[0], "n", *header[1:]],
        lines,
        words=f"{words} Set up as: {shared.pop()}.".strip() if len(shared) == 1 else words,
        plot=_timed_plot(shown, [own(name) for name in names]) if len(shown) > 1 else None,
        own=frozenset(i for i, name in enumerate(names) if own(name)),
        set_up=[(row.contestant, row.settings) for row in shown] if shared else (),
    )


def _timed_plot(rows: Sequence[Row], own: Sequence[bool]) -> Plot:
    if any(timing.items > 1 for row in rows for timing in row.timings):
        quantity, values = f"{rows[0].unit}/s", [row.items_per_second for row in rows]
    else:
        factor, unit = unit_of_time(max(row.wall_seconds.median for row in rows))
        quantity, values = f"{unit}, less is better", [scaled(row.wall_seconds, factor) for row in rows]
    bars = [Bar(row.contestant, value, mine) for row, value, mine in zip(rows, values, own, strict=True)]
    return bars_plot(bars, quantity)


def bars_plot(bars: Sequence[Bar], quantity: str) -> Plot:
    medians = "; ".join(f"{bar.label} {figure(bar.value.median)}" for bar in bars)
    return Plot(partial(draw_bars, bars, quantity), f"{quantity}: {medians}.")


def scaled(value: Spread, factor: float) -> Spread:
    return Spread(*(factor * one for one in value))


def exactly(value: float) -> Spread:
    """Of what was measured once."""
    return Spread(value, value, value)


def memory_block(
    results: Sequence[Result],
    title: str,
    own: Callable[[str], bool] = lambda name: False,
    labels: dict[str, str] | None = None,
    ranked: bool = False,
) -> Block:
    """Of `memory.MemoryRow`: measured once each."""
    found = sorted(results, key=lambda result: result["own_bytes"]) if ranked else list(results)
    names = [(labels or {}).get(result.name, result.name) for result in found]
    lines = [
        [name, "1", f"{result['own_bytes'] / 1e6:,.1f}", f"{result['file_bytes'] / 1e6:,.1f}", str(result["processes"])]
        for name, result in zip(names, found, strict=True)
    ]
    bars = [
        Bar(name, exactly(result["own_bytes"] / 1e6), own(result.name))
        for name, result in zip(names, found, strict=True)
    ]
    return block_of(
        found,
        title,
        ("contestant", "n", "MB of its own", "MB of mapped files", "processes"),
        lines,
        words="At its peak, by how much memory grew, summed over processes (PSS).",
        plot=bars_plot(bars, "MB of its own, less is better") if len(bars) > 1 else None,
        own=frozenset(i for i, result in enumerate(found) if own(result.name)),
        set_up=[(name, result["settings"]) for name, result in zip(names, found, strict=True)],
    )


def plain_block(results: Sequence[Result], title: str) -> Block:
    """Of rows that no other function knows: every field that is a figure or a word, so that nothing goes unseen."""
    names = [n for n in dict.fromkeys(name for r in results for name in r.row) if n not in _NO_FIGURES]
    header = [name.replace("_", " ") for name in names if any(_shown(r.row.get(name)) for r in results)]
    lines = [
        [_shown(r.row.get(name)) for name in names if any(_shown(other.row.get(name)) for other in results)]
        for r in results
    ]
    return block_of(results, title, header, lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and set(value) == set(Spread._fields):
        return f"{figure(value['median'])} ({figure(value['min'])} to {figure(value['max'])})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, str | int) else ""
