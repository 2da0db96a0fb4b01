"""Accuracy against k, for each order in which the pictures of a group can come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pipeline.audit.rows import Row, per_image
from pipeline.page.drawing import Theme

# Protocol -> marker, dashes, and whether the marker is filled: told apart in grey print too.
_LOOKS: dict[int, tuple[str, str, bool]] = {
    6: ("s", ":", False),
    3: ("D", "-", True),
    5: ("^", "--", False),
    4: ("v", "-.", False),
}
_LABELS = {
    3: "noise, class order",
    4: "noise, shuffled",
    5: "noise, one of each class",
    6: "no noise, plain voting in class order",
}


def draw_accuracies(rows: Sequence[Row], theme: Theme) -> Figure:
    """One panel for each noise; k on a logarithmic axis, the accuracy per image as a line across."""
    noises = list(dict.fromkeys(row.noise for row in rows if row.protocol == 3))
    figure = Figure(figsize=(9, 0.9 + 3.4 * len(noises)), layout="constrained")
    panels = figure.subplots(len(noises), 1, squeeze=False)[:, 0]
    ks = sorted({row.k for row in rows if row.protocol == 3})
    for axis, noise in zip(panels, noises, strict=True):
        _panel(axis, [row for row in rows if row.noise in (noise, None)], ks, theme)
        axis.set_title(noise, loc="left", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    panels[-1].set_xlabel("k: pictures in a group")
    return figure


def _panel(axis: Any, rows: Sequence[Row], ks: Sequence[int], theme: Theme) -> None:
    plain = per_image(rows).value
    assert plain is not None
    axis.axhline(100 * plain, color=theme.per_image, linewidth=2, label=f"per image, noise off: {100 * plain:.2f} %")
    for protocol, (marker, dashes, filled) in _LOOKS.items():
        found = [row for row in rows if row.protocol == protocol]
        color = theme.text if protocol == 6 else theme.transductive
        axis.plot(
            [row.k for row in found],
            [100 * (row.value or 0) for row in found],
            color=color,
            linestyle=dashes,
            linewidth=1.4,
            marker=marker,
            markersize=7,
            markerfacecolor=color if filled else theme.back,
            label=_LABELS[protocol],
        )
        for row in found:
            if row.spread is not None:
                axis.plot([row.k] * 2, [100 * end for end in row.spread], color=color, linewidth=4, alpha=0.5)
    axis.set_xscale("log")
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.xaxis.set_minor_locator(NullLocator())
    values = [100 * value for row in rows if row.protocol in (1, *_LOOKS) and (value := row.value) is not None]
    axis.set_ylim(max(0, min(values) - 5), min(102, max(values) + 5))  # at the official place all lies within 3 points
    axis.set_ylabel("top-1 (%)")
