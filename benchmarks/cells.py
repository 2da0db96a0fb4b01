"""Cells of a measurement that takes minutes: each is kept when it is done, and the same command goes on from there."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.harness import OnTurn, append_rows, read_rows

_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = (".py", ".h", ".cuh", ".cu", ".cpp")
# Of the environment: what a kept result must share with a new one. The commit would forget uncommitted changes.
_SAME = ("torch", "timm", "device")


@dataclass(frozen=True)
class Cell:
    """A part of a run that is measured in one go."""

    name: str
    conditions: dict[str, Any]
    """All that the result depends on beside the code and the environment; JSON types."""
    weight: float
    """What it costs, in proportion to the others."""
    measure: Callable[[dict[str, Any]], list[str]]
    """Takes what each of its rows has to carry; returns the rows as JSON lines."""


@cache
def code_digest() -> str:
    """Of the sources of pipeline/ and benchmarks/: a result of other code is measured again."""
    digest = hashlib.sha256()
    for package in ("pipeline", "benchmarks"):
        for path in sorted((_ROOT / package).rglob("*")):
            if path.suffix in _SOURCES and path.is_file():
                digest.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check_minutes(minutes: float) -> None:
    if not 0 < minutes < math.inf:
        raise ValueError(f"--minutes {minutes}: a finite time above 0")


def run_cells(
    question: str,
    cells: Sequence[Cell],
    path: Path,
    circumstances: dict[str, Any],
    minutes: float,
    on_turn: OnTurn,
    start: float | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Measures the cells that are not kept in `path` yet; returns the rows of each that now is, in order.

    A cell is begun only where it should end within `minutes` of `start` (of time.monotonic; None: of the call), by what
    those before it took; the first is begun in any case. circumstances: of `circumstances_of`.
    """
    start, seconds_a_weight = time.monotonic() if start is None else start, 0.0
    kept = {cell.name: rows for cell in cells if (rows := _kept(question, cell, path, circumstances))}
    left = [cell for cell in cells if cell.name not in kept]
    if kept:
        what = "nothing is left to measure" if not left else "these are not measured again"
        print(f"{path} has {len(kept)} of {len(cells)} cells already ({'; '.join(kept)}): {what}")
    for measured, cell in enumerate(left):
        begun = time.monotonic()
        if measured and begun - start + seconds_a_weight * cell.weight > 60 * minutes:
            print(
                f"stopped with {len(kept)} of {len(cells)} cells done: {cell.name} would not end within "
                f"--minutes {minutes:g}; the same command goes on with it"
            )
            break
        on_turn(cell.name)
        append_rows(path, cell.measure(circumstances | _marks(cell)))
        kept[cell.name] = _kept(question, cell, path, circumstances)
        seconds_a_weight = max(seconds_a_weight, (time.monotonic() - begun) / cell.weight)
    return {cell.name: kept[cell.name] for cell in cells if cell.name in kept}


def _marks(cell: Cell) -> dict[str, Any]:
    return {"cell": cell.name, "conditions": cell.conditions, "code": code_digest()}


def _kept(question: str, cell: Cell, path: Path, circumstances: dict[str, Any]) -> list[dict[str, Any]]:
    """The newest rows of this very cell; none where it has not been measured."""
    marks = json.loads(json.dumps({"question": question} | _marks(cell)))
    here = [circumstances["environment"][name] for name in _SAME]
    found = [
        row
        for row in (read_rows(path) if path.exists() else [])
        if {name: row.get(name) for name in marks} == marks and [row["environment"].get(name) for name in _SAME] == here
    ]
    return [row for row in found if row["time_utc"] == found[-1]["time_utc"]]
