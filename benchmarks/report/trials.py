"""The blocks of questions whose figures are tests and answers: draws, accuracy and cifar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.report.blocks import Block, Plot, block_of
from benchmarks.report.checks import check_accuracy, check_cifar
from benchmarks.report.plots import draw_p_values
from benchmarks.report.results import Alike, Result
from benchmarks.report.speed import by_part
from pipeline.intervals import mean_interval

if TYPE_CHECKING:
    from benchmarks.accuracy_summary import Line
    from pipeline.report.plots import Point

DRAWS = Alike(all_parts=True)
ACCURACY = Alike(("noise", "seed", "asked_with"), means=True)
CIFAR = Alike(("seed", "noise"), means=True, all_parts=True)


def draws_variant(result: Result) -> str:
    return f"on {result.place}"


def draws_blocks(results: Sequence[Result]) -> Iterator[Block]:
    """One table: the verdict is over all of them."""
    lines = [
        [
            f"{result.part}: {result.name}",
            f"{result['n']:,}",
            f"{result['statistic']:.6g}",
            str(result["law"]),
            f"{result['p_value']:.3g}",
            f"{result['p_holm']:.3g}",
            "passed" if result["passed"] else "FAILED",
        ]
        for result in results
    ]
    family = results[0].condition("family")
    failed = [f"{result.part}: {result.name}" for result in results if not result["passed"]]
    verdict = f"FAILED: {'; '.join(failed)}." if failed else "All passed."
    series = {part: [result["p_value"] for result in of_part] for part, of_part in by_part(results).items()}
    yield block_of(
        results,
        f"{len(results)} tests of {results[0].condition('draws'):,} draws",
        ("test", "n", "statistic", "of right draws", "p-value", "Holm's", ""),
        lines,
        DRAWS,
        words=f"{verdict} Two-sided p-values; Holm's are adjusted for all {family['tests']} tests of the run, and one "
        f"below {family['level']:g} is a failure.",
        plot=Plot(
            partial(draw_p_values, series),
            f"Sorted p-values; the smallest is {min(min(values) for values in series.values()):.2g}.",
        ),
    )


def accuracy_variant(result: Result) -> str:
    names = ("pictures", "epochs", "batch", "dtype", "device", "group_train", "group_eval")
    pictures, epochs, batch, dtype, device, in_training, k = (result.condition(name) for name in names)
    how = f"{epochs} epochs, batch {batch}, rate {result.number('lr'):g}, {dtype} on {device}"
    return f"{pictures}; {how}; groups of {in_training} in training, k = {k} at inference"


def accuracy_blocks(results: Sequence[Result]) -> Iterator[Block]:
    from benchmarks.accuracy_summary import HEADER, WHAT_IT_SHOWS, lines_of  # with it comes torch
    from pipeline.report.plots import draw_accuracies

    check_accuracy(results)
    for model, of_model in by_part(results).items():
        lines = lines_of([result.row for result in of_model])
        points = [point for line in lines for point in _points(line)]
        yield block_of(
            of_model,
            model,
            HEADER,
            [line.cells() for line in lines],
            ACCURACY,
            words=" ".join(WHAT_IT_SHOWS),
            plot=Plot(
                partial(draw_accuracies, points),
                "Top-1 over seeds with its 95 % interval, per image and transductive; the figures stand in the table.",
                large=True,
            ),
        )


def _points(line: Line) -> Iterator[Point]:
    """Those that the line has; a noise that is the identity for a picture on its own has none per image."""
    what = ", ".join(part for part in (line.noise, line.site, line.acts) if part)
    for order, values in (("", line.per_image), ("class order", line.class_order), ("shuffled", line.shuffled)):
        if values:
            yield point(f"{what}: {order}" if order else what, values, transductive=bool(order))


def point(label: str, values: Sequence[float], transductive: bool) -> Point:
    """Mean and 95 % interval over seeds. values: in percent."""
    from pipeline.report.plots import Point

    mean = fmean(values)
    low, high = mean_interval(values) or (mean, mean)
    return Point(label, mean / 100, max(0.0, low / 100), min(1.0, high / 100), transductive)


def cifar_variant(result: Result) -> str:
    names = ("pictures", "epochs", "batch", "width", "depth", "patch", "dtype")
    pictures, epochs, batch, width, depth, patch, dtype = (result.condition(name) for name in names)
    how = f"{epochs} epochs, batch {batch}, {depth} blocks of {width}, patches of {patch}, {dtype} on {result.place}"
    return f"{pictures}; {how}; the noisy twin's: {result.condition('noisy_twin')}"


def cifar_blocks(results: Sequence[Result]) -> Iterator[Block]:
    from benchmarks.cifar_summary import identity, part, summary_table  # with it comes torch

    check_cifar(results)
    rows = [result.row for result in results]
    title, header, lines = summary_table(rows)
    parting = part(rows)
    words = ["Every line with class mates is transductive: a picture's answer hangs on the others of its group."]
    words += [f"At inference {identity(rows)}."]
    words += [] if parting is None else [parting.sentence()]
    yield block_of(results, title.removeprefix("cifar: "), header, lines, CIFAR, words=" ".join(words))
