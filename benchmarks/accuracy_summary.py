"""The grid's table: what a picture gets on its own, what its batch mates add, and the paper's figure beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.accuracy_grid import Model
from benchmarks.harness import print_table
from pipeline.intervals import mean_interval
from pipeline.published import published_top1

HEADER = (
    "noise",
    "site",
    "acts in",
    "seeds",
    "per image, top-1 %",
    "to clean, points",
    "class order",
    "shuffled",
    "published",
)
WHAT_IT_SHOWS = (
    "These are small models on small pictures, trained for minutes: they show what is per image and what is not, "
    "never what a large model reaches on ImageNet.",
    "Per image: a picture on its own. A linear noise is the identity there (k = 1), so at inference alone it leaves "
    "the clean model's answers as they are.",
    "Class order and shuffled are transductive: a picture's answer hangs on the others of its group.",
    "95 % intervals are Student's, over seeds; differences are formed seed by seed, of twins that share initial "
    "weights, order, crops and flips.",
    "Published: the paper's figure on ImageNet, beside its own place and phase: a ViT's noise acts at inference, in "
    "class order, a ResNet's always. It is of the model named, to which this one is the nearest; from secondary text, "
    "not checked against the paper's tables.",
)

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Line:
    """One noise in one phase. All figures in percent, one for each seed."""

    model: str
    noise: str
    site: str
    acts: str
    per_image: tuple[float, ...]
    differences: tuple[float, ...]
    """To the clean twin per image; empty for itself."""
    class_order: tuple[float, ...]
    shuffled: tuple[float, ...]
    published: str

    def cells(self) -> list[str]:
        return [
            self.noise,
            self.site,
            self.acts,
            str(len(self.per_image or self.class_order)),
            shown(self.per_image),
            shown(self.differences, "+"),
            shown(self.class_order),
            shown(self.shuffled),
            self.published,
        ]


def shown(values: Sequence[float], sign: str = "") -> str:
    """Mean and 95 % interval in percent; nothing for none. sign: `+` for differences."""
    if not values:
        return ""
    interval = mean_interval(values)
    if interval is None:
        return f"{fmean(values):{sign}.2f}"
    # A share has ends that Student's t knows nothing of; a difference has none.
    low, high = interval if sign else (max(0.0, interval.low), min(100.0, interval.high))
    return f"{fmean(values):{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def lines_of(rows: Rows) -> list[Line]:
    """Model by model: clean first, then noise in training, then at inference alone."""
    found: list[Line] = []
    for model in dict.fromkeys(row["part"] for row in rows):
        of_model = sorted((row for row in rows if row["part"] == model), key=lambda row: row["seed"])
        clean = {row["seed"]: row for row in of_model if row["trained_with"] is None}
        found += _clean_lines(model, list(clean.values()))
        found += _trained_lines(model, [row for row in of_model if row["trained_with"] is not None], clean)
        found += _asked_lines(model, list(clean.values()))
    return found


def _clean_lines(model: str, rows: Rows) -> Iterator[Line]:
    if rows:
        off, voted = (_percent(rows, during, None) for during in ("off", "vote"))
        yield Line(model, "none", "", "", off, (), (), (), _published(model, "none"))
        yield Line(model, "none, logits averaged", "", "inference", (), (), voted, (), "")


def _trained_lines(model: str, rows: Rows, clean: dict[int, dict[str, Any]]) -> Iterator[Line]:
    points = {_key(row["trained_with"]): row["trained_with"] for row in rows}
    for key, point in points.items():
        own = [row for row in rows if _key(row["trained_with"]) == key]
        off = _percent(own, "off", None)
        yield Line(
            model,
            _noise(point),
            point["site"],
            "training",
            off,
            _differences(own, clean, "off", None),
            (),
            (),
            "",
        )
        alone = _percent(own, "both", point, "any")
        yield Line(
            model,
            _noise(point),
            point["site"],
            "both",
            alone,
            _differences(own, clean, "both", point),
            _percent(own, "both", point, "class"),
            _percent(own, "both", point, "shuffled"),
            _published(model, point["kind"], point["site"], "both"),
        )


def _asked_lines(model: str, rows: Rows) -> Iterator[Line]:
    """Noise at inference alone, on the clean twins."""
    asked = [found["point"] for row in rows for found in row["found"] if found["during"] == "eval"]
    for point in {_key(point): point for point in asked}.values():
        alone = _percent(rows, "eval", point, "any")
        yield Line(
            model,
            _noise(point),
            point["site"],
            "inference",
            alone,
            _differences(rows, {row["seed"]: row for row in rows}, "eval", point),
            _percent(rows, "eval", point, "class"),
            _percent(rows, "eval", point, "shuffled"),
            _published(model, point["kind"], point["site"], "inference"),
        )


def _percent(rows: Rows, during: str, point: dict[str, Any] | None, order: str | None = None) -> tuple[float, ...]:
    """Of each row in turn; empty where that was not asked of it."""
    return tuple(
        100 * found["correct_top1"] / found["num_images"]
        for row in rows
        for found in row["found"]
        if found["during"] == during and found["point"] == point and order in (None, found["order"])
    )


def _differences(
    rows: Rows, clean: dict[int, dict[str, Any]], during: str, point: dict[str, Any] | None
) -> tuple[float, ...]:
    """Per image, to the clean twin of the same seed, where both were asked."""
    return tuple(
        own - _percent([clean[row["seed"]]], "off", None)[0]
        for row in rows
        if row["seed"] in clean
        for own in _percent([row], during, point, "any")
    )


def _key(point: dict[str, Any]) -> tuple[str, float | None, str]:
    return point["kind"], point["strength"], point["site"]


def _noise(point: dict[str, Any]) -> str:
    strength = "" if point["strength"] is None else f" {point['strength']:g}"
    return point["kind"].replace("_", " ") + strength


def _published(model: str, kind: str, site: str = "", acts: str = "") -> str:
    """Of no noise, or at the paper's place and in its phase; nothing elsewhere."""
    found = published_top1(Model(model).config.name, kind)
    if found is None or found.top1 is None:
        return ""
    own = ("last", "inference" if found.column.startswith("ViT") else "both")  # PAPER.md, section 3
    if kind != "none" and (site, acts) != own:
        return ""
    return f"{found.top1:.2f} ({found.column})"


def print_summary(rows: Rows) -> None:
    """rows: of every training that is done."""
    lines = lines_of(rows)
    for model in dict.fromkeys(line.model for line in lines):
        conditions = next(row["conditions"] for row in rows if row["part"] == model)
        title = f"accuracy: {model}; {conditions['pictures']}; k = {conditions['group_eval']} at inference"
        print_table(title, HEADER, [line.cells() for line in lines if line.model == model])
    for sentence in WHAT_IT_SHOWS:
        print(sentence)
