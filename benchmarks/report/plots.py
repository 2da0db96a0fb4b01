"""The plots of measurements: a figure with its lowest and highest, a line each."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from benchmarks.harness import Spread, figure
from pipeline.page.drawing import Theme

WIDE = 20  # the highest over the lowest from which on an axis is logarithmic
_WIDTH, _LABEL = 6.0, 30  # inches, and characters of a label's line: on a phone's 335 pixels letters are 8 high
_OTHERS = 0.55  # opacity of what is not this project's, which print in grey keeps apart too


@dataclass(frozen=True)
class Bar:
    """One contestant's line."""

    label: str
    value: Spread
    own: bool = False
    """Of this project."""
    aim: float | None = None
    """What was stated before measuring; drawn as a tick across the line."""


def draw_bars(bars: Sequence[Bar], quantity: str, theme: Theme) -> Figure:
    """Bars from zero; where the span is wide, points on a logarithmic axis, where a bar's length would mean nothing."""
    labels = [textwrap.fill(bar.label, _LABEL) for bar in bars]
    line_inches = 0.17 + 0.16 * (1 + max(label.count("\n") for label in labels))
    image = Figure(figsize=(_WIDTH, 0.8 + len(bars) * line_inches), layout="constrained")
    axis = image.subplots()
    lowest, highest = min(bar.value.min for bar in bars), max(max(bar.value.max, bar.aim or 0) for bar in bars)
    logarithmic = lowest > 0 and highest > WIDE * lowest
    for y, bar in enumerate(bars):
        _draw_bar(axis, y, bar, logarithmic, theme)
    axis.set_yticks(range(len(bars)), labels)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    if logarithmic:
        axis.set_xscale("log")
        axis.set_xlim(lowest / 1.5, highest * (highest / lowest) ** 0.2)  # room for the figure
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if highest < 1000 * lowest else (1.0,)))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.set_xlim(0, 1.2 * highest)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, position: figure(value)))
    axis.set_xlabel(f"{quantity} (logarithmic)" if logarithmic else quantity)
    axis.spines["left"].set_visible(logarithmic is False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    return image


def _draw_bar(axis: Any, y: int, bar: Bar, logarithmic: bool, theme: Theme) -> None:
    color, alpha = (theme.per_image, 1.0) if bar.own else (theme.text, _OTHERS)
    median, low, high = bar.value
    if logarithmic:
        axis.plot([median], [y], marker="o", markersize=8, color=color, alpha=alpha, linestyle="none", zorder=3)
        axis.plot([low, high], [y, y], color=color, alpha=alpha, linewidth=2, solid_capstyle="butt", zorder=2)
    else:
        axis.barh([y], [median], height=0.62, color=color, alpha=alpha, zorder=2)
    if low < high and not logarithmic:
        seen = [withStroke(linewidth=3.2, foreground=theme.back)]  # on a dark bar too
        axis.plot([low, high], [y, y], color=theme.text, linewidth=1.2, path_effects=seen, zorder=3)
    if bar.aim is not None:
        axis.plot([bar.aim], [y], marker="|", markersize=18, markeredgewidth=2.5, color=theme.transductive, zorder=4)
    right = max(high, bar.aim or 0)
    axis.annotate(figure(median), (right, y), xytext=(8, 0), textcoords="offset points", va="center", color=theme.text)


@dataclass(frozen=True)
class Line:
    """A series over numbers that double, such as ranks."""

    label: str
    xs: Sequence[float]
    values: Sequence[Spread]
    own: bool = True


def draw_lines(lines: Sequence[Line], across: str, quantity: str, theme: Theme) -> Figure:
    """Medians joined, lowest to highest as whiskers; the horizontal axis doubles, the other begins at zero."""
    image = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    axis = image.subplots()
    for line in lines:
        medians = [value.median for value in line.values]
        ends = [
            [value.median - value.min for value in line.values],
            [value.max - value.median for value in line.values],
        ]
        color, style = (theme.per_image, "-") if line.own else (theme.transductive, "--")
        axis.errorbar(line.xs, medians, ends, color=color, linestyle=style, marker="o", capsize=3, label=line.label)
    xs = sorted({x for line in lines for x in line.xs})
    axis.set_xscale("log", base=2)
    axis.set_xticks(xs, [f"{x:g}" for x in xs])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(0, 1.05 * max(value.max for line in lines for value in line.values))
    axis.set_xlabel(across)
    axis.set_ylabel(quantity)
    axis.legend(frameon=False, loc="lower left")
    return image


def draw_p_values(series: Mapping[str, Sequence[float]], theme: Theme) -> Figure:
    """Sorted p-values beside where those of right draws lie on average; both axes logarithmic."""
    image = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axis = image.subplots()
    looks = ((theme.per_image, "o", theme.per_image), (theme.transductive, "D", theme.back))
    lowest = 1.0
    for (name, values), (color, marker, face) in zip(series.items(), looks, strict=False):
        expected = [rank / (len(values) + 1) for rank in range(1, len(values) + 1)]
        axis.plot(
            expected,
            sorted(values),
            linestyle="none",
            marker=marker,
            markersize=6,
            color=color,
            markerfacecolor=face,
            label=f"{name}: {len(values)} tests",
            zorder=3,
        )
        lowest = min(lowest, *expected, *values)
    axis.plot([lowest, 1], [lowest, 1], color=theme.text, linewidth=1, label="right draws, on average")
    axis.set(xscale="log", yscale="log", xlabel="rank of the test over their number + 1", ylabel="p-value")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
        side.set_minor_locator(NullLocator())
    axis.legend(frameon=False, loc="upper left")
    return image
