"""The report's plots, as SVG text.

What is per image and what is transductive differ in colour, lightness and marker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipeline.page.drawing import Theme


@dataclass(frozen=True)
class Curve:
    """One run over its epochs: the logged training loss (nats) and the per-image top-1 (0 to 1)."""

    title: str
    loss_epochs: Sequence[float]
    losses: Sequence[float]
    top1_epochs: Sequence[float]
    top1s: Sequence[float]


@dataclass(frozen=True)
class Point:
    """One accuracy with its interval, all from 0 to 1."""

    label: str
    top1: float
    low: float
    high: float
    transductive: bool


def draw_training(curves: Sequence[Curve], theme: Theme) -> Figure:
    """One column a run: loss above, accuracy below."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False, gridspec_kw={"wspace": 0.08})
    for column, curve in enumerate(curves):
        loss, accuracy = axes[0][column], axes[1][column]
        loss.plot(curve.loss_epochs, curve.losses, color=theme.text, linewidth=1.4, clip_on=False)
        _end_label(loss, curve.loss_epochs[-1], curve.losses[-1], f"{curve.losses[-1]:.2f}", theme.text)
        loss.set_title(curve.title)
        loss.set_ylim(0, 1.1 * max(curve.losses))
        percent = [100 * value for value in curve.top1s]
        accuracy.plot(
            curve.top1_epochs,
            percent,
            color=theme.per_image,
            linewidth=1.4,
            marker="o",
            markersize=3,
            clip_on=False,
        )
        _end_label(accuracy, curve.top1_epochs[-1], percent[-1], f"{percent[-1]:.2f} %", theme.per_image)
        accuracy.set_ylim(0, 105)
        accuracy.set_xlabel("epoch")
        for axis in (loss, accuracy):
            axis.set_xlim(0, max(curve.loss_epochs[-1], curve.top1_epochs[-1]))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].set_ylabel("training loss (nats)")
    axes[1][0].set_ylabel("validation top-1 (%)\nper image, noise off")
    return figure


def draw_accuracies(points: Sequence[Point], theme: Theme) -> Figure:
    """Top-1 with intervals, one line each, the first on top."""
    figure = Figure(figsize=(9, 1.1 + 0.42 * len(points)), layout="constrained")
    axis = figure.subplots()
    for y, point in enumerate(points):
        _draw_point(axis, y, point, theme)
    axis.set_yticks(range(len(points)), [point.label for point in points])
    axis.set_ylim(len(points) - 0.5, -0.5)
    axis.set_xlim(0, 112)  # room for the label of a figure near 100 %
    axis.set_xticks(range(0, 101, 20))
    axis.set_xlabel("top-1 (%), with 95 % interval")
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    marks = [_mark(theme, transductive) for transductive in (False, True)]
    figure.legend(handles=marks, loc="outside upper left", ncols=2, frameon=False)
    return figure


def _draw_point(axis: Any, y: int, point: Point, theme: Theme) -> None:
    color, marker, face = _look(theme, point.transductive)
    low, top1, high = (100 * value for value in (point.low, point.top1, point.high))
    axis.plot([low, high], [y, y], color=color, linewidth=2, solid_capstyle="butt", zorder=2)
    axis.plot([top1], [y], marker=marker, color=color, markerfacecolor=face, markersize=8, zorder=3)
    axis.annotate(
        f"{top1:.2f}", (max(high, top1), y), xytext=(9, 0), textcoords="offset points", va="center", color=theme.text
    )


def _mark(theme: Theme, transductive: bool) -> Line2D:
    color, marker, face = _look(theme, transductive)
    label = "transductive: depends on the group" if transductive else "per image: a picture on its own"
    return Line2D([], [], color=color, marker=marker, markerfacecolor=face, markersize=8, linewidth=2, label=label)


def _look(theme: Theme, transductive: bool) -> tuple[str, str, str]:
    """Colour, marker and the marker's filling."""
    return (theme.transductive, "D", theme.back) if transductive else (theme.per_image, "o", theme.per_image)


def _end_label(axis: Any, x: float, y: float, text: str, color: str) -> None:
    """Right of the curve's end, outside the axes."""
    axis.annotate(
        text, (x, y), xytext=(6, 0), textcoords="offset points", va="center", color=color, annotation_clip=False
    )
