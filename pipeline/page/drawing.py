"""How every plot looks: two themes, one style, and SVG that is the same for the same data."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of one reading mode. The two kinds of accuracy lie far apart in lightness, for print in grey."""

    text: str
    back: str
    grid: str
    per_image: str
    transductive: str


LIGHT = Theme(text="#24292f", back="#ffffff", grid="#d8dee4", per_image="#0b3d66", transductive="#e07b00")
DARK = Theme(text="#e6edf3", back="#0d1117", grid="#3d444d", per_image="#9fd3ff", transductive="#d9730d")


THEMES = {"light": LIGHT, "dark": DARK}


def plot_uris(draw: Callable[[Theme], Figure]) -> dict[str, str]:
    """Mode -> data URI of the SVG that `draw` makes, for plot.html.j2."""
    return {mode: svg_uri(svg_text(draw, theme)) for mode, theme in THEMES.items()}


def svg_text(draw: Callable[[Theme], Figure], theme: Theme = LIGHT) -> str:
    with matplotlib.rc_context(_style(theme)):
        figure = draw(theme)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def svg_uri(svg: str) -> str:
    """SVG text as a page holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _style(theme: Theme) -> Any:
    return {
        "font.size": 10,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.grid,
        "axes.titlecolor": theme.text,
        "axes.titlesize": 11,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "svg.fonttype": "path",  # reads the same wherever it is opened
        "svg.hashsalt": "report",  # the same data gives the same file
    }
