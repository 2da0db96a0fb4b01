"""README.md's figures of accuracy: for each model what a picture gets on its own, and what its group makes of it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.report.markdown import picture, table
from benchmarks.report.results import Result, check_alike
from benchmarks.report.trials import ACCURACY, point
from pipeline.page.drawing import Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.accuracy_summary import Line

PLOT = "accuracy"  # what its files are called, before -light.svg and -dark.svg
_PLOTTED = "Top-1 of both models, per image and transductive; the figures stand in the table."
# (words, site, which of a line's figures, order of the pictures): what optimal Q does at inference.
_ASKED = tuple(
    (f"optimal Q {where}, {order.replace('_', ' ')}", site, order, order.removesuffix("_order"))
    for site, where in (("last", "at the official place"), ("residual", "into the last block, all tokens"))
    for order in ("class_order", "shuffled")
)


class _Row(NamedTuple):
    words: str
    site: str  # of the noise; empty for none
    order: str  # in which class mates meet; empty for a picture on its own
    values: dict[str, tuple[float, ...]]  # in percent, by model; a model that was not asked is not there


def accuracy_figures(found: Sequence[Result], plots: str) -> str:
    """Intro, plot and table. plots: the folder with the plot's files. Errors: ValueError where a figure is missing."""
    from benchmarks.accuracy_summary import shown

    rows = _rows(found)
    cells = [result.row for result in found]
    models = list(dict.fromkeys(result.part for result in found))
    k, pictures, epochs = (found[0].condition(name) for name in ("group_eval", "pictures", "epochs"))
    seeds = counted(len(values) for row in rows for values in row.values.values())
    intro = (
        f"Measured (`python -m benchmarks accuracy`): {_short(models)}; {pictures}; {epochs} epochs; k = {k}; "
        f"{seeds} seeds, mean and 95 % interval in percent:"
    )
    lines = []
    for number, row in enumerate(rows):
        line = [row.words, _mates(cells, row.order), *(shown(row.values.get(model, ())) for model in models)]
        lines.append([f"**{cell}**" if cell and number == 0 else cell for cell in line])
    header = ["", "class mates in the group", *map(_name, models)]
    return "\n\n".join(
        (filled(intro), picture(f"{plots}/{PLOT}", _PLOTTED), table(header, lines, [False] * len(header)))
    )


def draw_accuracy(found: Sequence[Result], theme: Theme) -> Figure:
    """The table's lines, model by model."""
    from pipeline.report.plots import draw_accuracies

    points = []
    for model in dict.fromkeys(result.part for result in found):
        for row in _rows(found):
            if values := row.values.get(model):
                points.append(point(f"{_name(model)}: {row.words}", values, transductive=bool(row.order)))
    return draw_accuracies(points, theme)


def filled(sentence: str) -> str:
    """As the README's other lines, no word broken."""
    return textwrap.fill(sentence, 124, break_long_words=False, break_on_hyphens=False)


def _rows(found: Sequence[Result]) -> list[_Row]:
    from benchmarks.accuracy_summary import lines_of  # with it comes torch

    if not found:
        raise ValueError("the README's figures of accuracy are not measured: `python -m benchmarks accuracy`")
    check_alike(found, ACCURACY._replace(within=(*ACCURACY.within, "model")))
    lines = lines_of([result.row for result in found])

    def row(words: str, noise: str, site: str, acts: str, figure: str, order: str = "") -> _Row:
        own: list[Line] = [line for line in lines if (line.noise, line.site, line.acts) == (noise, site, acts)]
        return _Row(words, site, order, {line.model: getattr(line, figure) for line in own})

    trained = dict.fromkeys(line.noise for line in lines if (line.site, line.acts) == ("last", "training"))
    rows = [
        row("per image, noise off", "none", "", "", "per_image"),
        *(
            row(f"per image, noise off; trained with {noise}", noise, "last", "training", "per_image")
            for noise in trained
        ),
        *(row(words, "optimal q", site, "inference", figure, order) for words, site, figure, order in _ASKED),
        row("no noise, logits averaged, class order", "none, logits averaged", "", "inference", "class_order", "class"),
    ]
    _need_all(rows, lines)
    return rows


def _need_all(rows: Sequence[_Row], lines: Sequence[Line]) -> None:
    """Errors: ValueError where a model lacks a figure, but of a place that it has not got while another has it."""
    sites: dict[str, set[str]] = {}
    for line in lines:
        sites.setdefault(line.model, {""}).add(line.site)
    for row in rows:
        measured = any(row.values.values())
        lacking = [m for m, own in sites.items() if not row.values.get(m) and (row.site in own or not measured)]
        if lacking:
            raise ValueError(
                f"the README's figures of accuracy, {row.words}, lack {' and '.join(map(_name, lacking))}: measure "
                "them, `python -m benchmarks accuracy` goes on where it ended"
            )


def _mates(cells: Sequence[dict[str, Any]], order: str) -> str:
    shares = [one["class_mates"] for cell in cells for one in cell["found"] if one["order"] == order]
    return f"{100 * sum(shares) / len(shares):.1f} %" if order else ""


def counted(numbers: Iterable[int]) -> str:
    """One number, or from the lowest to the highest."""
    found = sorted(set(numbers))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _name(model: str) -> str:
    return model.partition(":")[0]


def _short(models: Sequence[str]) -> str:
    options = [model.partition(":")[2] for model in models]
    return " and ".join(
        f"`{_name(model)}`" + (f" ({', '.join(option.split(','))})" if option else "")
        for model, option in zip(models, options, strict=True)
    )
