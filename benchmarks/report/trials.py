"""The blocks of questions whose figures are tests and answers: draws and cifar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.report.blocks import Block, Plot, block_of
from benchmarks.report.plots import draw_p_values
from benchmarks.report.results import Result
from benchmarks.report.speed import by_part


def draws_variant(result: Result) -> str:
    return f"on {result.condition('device')}"


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
        words=f"{verdict} Two-sided p-values; Holm's are adjusted for all {family['tests']} tests of the run, and one "
        f"below {family['level']:g} is a failure.",
        plot=Plot(
            partial(draw_p_values, series),
            f"Sorted p-values; the smallest is {min(min(values) for values in series.values()):.2g}.",
        ),
    )


def cifar_variant(result: Result) -> str:
    names = ("pictures", "epochs", "batch", "width", "depth", "patch", "dtype", "device")
    pictures, epochs, batch, width, depth, patch, dtype, device = (result.condition(name) for name in names)
    return (
        f"{pictures}; {epochs} epochs, batch {batch}, {depth} blocks of {width}, patches of {patch}, {dtype} on {device}"
    )


def cifar_blocks(results: Sequence[Result]) -> Iterator[Block]:
    from benchmarks.cifar_summary import identity, part, summary_table  # with it comes torch

    rows = [result.row for result in results]
    title, header, lines = summary_table(rows)
    parting = part(rows)
    words = [f"{identity(rows)}."[:1].upper() + f"{identity(rows)}."[1:]]
    words += ["Every line with class mates is transductive: a picture's answer hangs on the others of its group."]
    words += [] if parting is None else [parting.sentence()]
    yield block_of(results, title.removeprefix("cifar: "), header, lines, ("seed", "noise"), words=" ".join(words))
