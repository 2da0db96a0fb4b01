"""The page's plots, as SVG text. The same figures give the same text."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from data_prep.stats.describe import ASPECT_OCTAVES, BITS_OCTAVES, BYTES_OCTAVES, SIDE_OCTAVES, SplitStats, edges

TEXT, GRID, BACK = "#24292f", "#d8dee4", "#ffffff"
# They differ in lightness, for print in grey, and in dashes, so that one under another is seen.
_COLORS = ("#0b3d66", "#e07b00", "#2f8f6b", "#9a4fb3")
_DASHES = ("-", "--", ":", "-.")
_PANELS_IN_A_ROW = 3
_STYLE: Any = {
    "font.size": 10,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": BACK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "svg.fonttype": "path",  # reads the same wherever it is opened
    "svg.hashsalt": "stats",
}


def sides_svg(splits: Sequence[SplitStats]) -> str:
    """Width against height, a panel for each split."""
    with matplotlib.rc_context(_STYLE):
        columns = min(len(splits), _PANELS_IN_A_ROW)
        rows = math.ceil(len(splits) / columns)
        figure = Figure(figsize=(9, 0.4 + rows * min(4.6, 8.2 / columns)), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        borders = edges(SIDE_OCTAVES)
        used = sum(split.histograms.sides.sum(0) + split.histograms.sides.sum(1) for split in splits)
        low, high = _limits(used, borders, 4)
        most = max(split.histograms.sides.max() for split in splits)
        for axis, split in zip(axes, splits, strict=False):
            counts = np.ma.masked_equal(split.histograms.sides.T, 0)
            norm = LogNorm(0.5, max(most, 2))
            mesh = axis.pcolormesh(borders, borders, counts, cmap="viridis_r", norm=norm, rasterized=True)
            axis.plot([low, high], [low, high], color=TEXT, linewidth=0.7, linestyle=":")
            for place, scale, name in ((axis.xaxis, axis.set_xscale, "width"), (axis.yaxis, axis.set_yscale, "height")):
                scale("log", base=2)
                place.set_minor_locator(NullLocator())
                place.set_major_formatter(_plain())
                place.set_label_text(f"{name}, px")
            axis.set(xlim=(low, high), ylim=(low, high), title=_plain_text(split.name), aspect="equal")
        for axis in axes[len(splits) :]:
            axis.remove()
        bar = figure.colorbar(mesh, ax=axes[: len(splits)].tolist(), shrink=0.8, label="pictures", format=_plain())
        bar.ax.yaxis.set_minor_locator(NullLocator())
        return _svg(figure)


def aspect_svg(splits: Sequence[SplitStats]) -> str:
    ticks = [1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 2, 3, 4]
    names = ["1:4", "1:3", "1:2", "2:3", "3:4", "1", "4:3", "3:2", "2", "3", "4"]
    return _histogram_svg(
        splits, lambda s: s.histograms.aspect, ASPECT_OCTAVES, "width / height", lambda a: a.set_xticks(ticks, names)
    )


def bytes_svg(splits: Sequence[SplitStats]) -> str:
    def scale(axis: Any) -> None:
        axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _in_bytes(value)))

    return _histogram_svg(splits, lambda s: s.histograms.bytes, BYTES_OCTAVES, "size of the file", scale)


def bits_svg(splits: Sequence[SplitStats]) -> str:
    def scale(axis: Any) -> None:
        axis.xaxis.set_major_locator(LogLocator(2))
        axis.xaxis.set_major_formatter(_plain())

    return _histogram_svg(splits, lambda s: s.histograms.bits, BITS_OCTAVES, "bits a pixel", scale)


def classes_svg(splits: Sequence[SplitStats]) -> str:
    """Pictures of each class, the largest class first."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axis = figure.subplots()
        for number, split in enumerate(splits):
            counts = sorted((found.pictures for found in split.classes), reverse=True)
            axis.stairs(counts, np.arange(len(counts) + 1) + 0.5, baseline=None, **_look(number, split))
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("classes, the largest first")
        axis.set_ylabel("pictures")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(_plain())
        _legend(figure, splits)
        return _svg(figure)


def _histogram_svg(
    splits: Sequence[SplitStats],
    counts_of: Callable[[SplitStats], np.ndarray],
    octaves: tuple[int, int],
    label: str,
    scale: Callable[[Any], Any],
) -> str:
    """Shares of pictures over a logarithmic axis, so that splits of different sizes can be compared."""
    borders = edges(octaves)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        axis = figure.subplots()
        for number, split in enumerate(splits):
            counts = counts_of(split)
            look = _look(number, split)
            axis.stairs(counts / counts.sum(), borders, **look)
            if len(splits) == 1:
                axis.stairs(counts / counts.sum(), borders, fill=True, color=look["color"], alpha=0.15)
        axis.set_xscale("log", base=2)
        scale(axis)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlim(_limits(sum(counts_of(split) for split in splits), borders, 2))
        axis.set_ylim(bottom=0)
        axis.set_xlabel(label)
        axis.set_ylabel("share of pictures")
        axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        _legend(figure, splits)
        return _svg(figure)


def _limits(counts: Any, borders: np.ndarray, margin: int) -> tuple[float, float]:
    """From the first bin that is not empty to the last, and some bins around them."""
    used = np.flatnonzero(counts)
    return float(borders[max(0, used[0] - margin)]), float(borders[min(len(borders) - 1, used[-1] + 1 + margin)])


def _look(number: int, split: SplitStats) -> dict[str, Any]:
    color, dashes = _COLORS[number % len(_COLORS)], _DASHES[(number + number // len(_COLORS)) % len(_DASHES)]
    return {"color": color, "linestyle": dashes, "linewidth": 1.4, "label": _plain_text(split.name)}


def _legend(figure: Figure, splits: Sequence[SplitStats]) -> None:
    if len(splits) > 1:
        figure.legend(loc="outside upper left", ncols=3, frameon=False)


def _plain_text(name: str) -> str:
    # Between dollar signs matplotlib reads formulas; a leading underline hides a line from the legend.
    return " " * name.startswith("_") + name.replace("$", r"\$")


def _plain() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:,.6g}")


def _in_bytes(value: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if value >= unit:
            return f"{value / unit:.6g} {name}"
    return f"{value:.6g} B"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=160, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
