"""What was found, for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipeline.variants.corruptions import CELLS, CORRUPTIONS, EXTRA, SEVERITIES, Corruptions
from pipeline.variants.robustness import Robustness, Row


def print_robustness(found: Robustness) -> None:
    """One line a set, ImageNet-C's cells below, and what is not as it was published."""
    table = Table("set", "pictures", "classes", "top-1 %", "95 %", "top-5 %", "ECE %")
    for row in found.rows:
        table.add_row(*_cells_of(row))
    corruptions = found.corruptions
    if corruptions is not None:
        first = next(iter(found.cells.values()))
        held = sum(name in CORRUPTIONS for name, _ in found.cells)
        pictures = f"{CELLS if held == CELLS else f'{held} of {CELLS}'} x {first.pictures:,}"
        table.add_row("C, mean", pictures, str(first.classes), _percent(corruptions.mean) or "-", "", "", "")
    Console().print(table)
    if corruptions is not None:
        _print_corruptions(corruptions)
    ties = sum(len(row.near_ties) for row in (*found.rows, *found.cells.values()))
    if ties:
        print(f"{ties:,} answers lie within float32's rounding of another class; the JSON names them.")
    for note in found.notes:
        print(f"Note: {note}.")


def _cells_of(row: Row) -> tuple[str, ...]:
    low, high = row.top1_interval
    return (
        row.name.removeprefix("ImageNet-"),
        f"{row.pictures:,}",
        str(row.classes),
        _percent(row.top1),
        f"{100 * low:.2f}-{100 * high:.2f}",
        _percent(row.top5),
        _percent(row.calibration_error),
    )


def _print_corruptions(found: Corruptions) -> None:
    table = Table("corruption, top-1 %", *SEVERITIES, "mean")
    for name in (name for name in (*CORRUPTIONS, *EXTRA) if name in found.names):
        shares = [found.top1.get((name, severity)) for severity in SEVERITIES]
        label = f"{name} (extra)" if name in EXTRA else name
        table.add_row(label, *(_percent(share) or "-" for share in shares), _percent(found.mean_of(name)) or "-")
    Console().print(table)
    if found.mean is not None:
        print(f"Mean over {len(CORRUPTIONS)} corruptions x {len(SEVERITIES)} severities, unweighted: ", end="")
        print(f"top-1 {_percent(found.mean)} %, error {_percent(1 - found.mean)} %.")
    if found.mce is not None:
        print(f"mCE, each corruption's error over AlexNet's: {_percent(found.mce)} %.")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
