"""Contestants take turns in one process and are measured alike; each result carries what it depends on.

Machines are noisy and their clocks drift. So contestants alternate A B C A B C, a ratio is formed within one turn of
all, where both sides met the same machine, and median, lowest and highest are given. Nothing asserts a time.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.manifest import atomic_file

RESULTS = Path(__file__).parent / "results"

OnTurn = Callable[[str], None]
Agree = Callable[[Any, Any], str | None]


@dataclass(frozen=True)
class Contestant:
    """One way of doing the question's work."""

    name: str
    round: Callable[[], int]
    """Does one round and returns its count of items; on a GPU it waits for the queue before it returns."""
    settings: str
    """How it is set up, and where that choice comes from."""
    output: Callable[[], Any] | None = None
    """What it makes, to be compared with the others' before timing. None: there is nothing to compare."""
    between: Callable[[], None] | None = None
    """Called after each round, outside the clock."""
    bytes_per_item: int | None = None
    """Memory traffic that the work cannot avoid. None: not a question of memory."""


@dataclass(frozen=True)
class Timing:
    """One round of one contestant. The list that `compare` returns is in the order in which they ran."""

    contestant: str
    round: int
    items: int
    wall_seconds: float
    cpu_seconds: float  # of this process and all under it

    @property
    def items_per_second(self) -> float:
        return self.items / self.wall_seconds


class Spread(NamedTuple):
    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Row:
    """One contestant's result."""

    question: str
    part: str
    contestant: str
    settings: str
    unit: str  # of an item
    n: int  # rounds
    items_per_second: Spread
    wall_seconds: Spread  # of a round
    cpu_seconds_per_item: Spread
    ratio: Spread  # of items a second to `compared_with`'s, within each turn: above 1 is faster
    compared_with: str
    gigabytes_per_second: Spread | None
    timings: tuple[Timing, ...]

    def to_json(self, circumstances: dict[str, Any]) -> str:
        """One line. `circumstances`: what the row depends on, of `circumstances_of`."""
        spreads = {k: v._asdict() for k in self.__dict__ if isinstance(v := getattr(self, k), Spread)}
        return json.dumps(asdict(self) | spreads | circumstances, ensure_ascii=False)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Row:
        """Of a line of a results file, circumstances left out."""
        own = {field.name: row[field.name] for field in fields(cls)}
        spreads = {name: Spread(**value) for name, value in own.items() if isinstance(value, dict)}
        return cls(**own | spreads | {"timings": tuple(Timing(**timing) for timing in own["timings"])})


def _silent(what: str) -> None: ...


def compare(
    contestants: Sequence[Contestant], rounds: int, agree: Agree | None = None, on_turn: OnTurn = _silent
) -> list[Timing]:
    """Compares outputs, runs a warm-up round of each, then `rounds` timed turns A B C A B C.

    agree: takes two outputs and returns a complaint, or None where they agree. on_turn hears what comes next.
    Errors: ValueError for outputs that differ (nothing is timed then), no rounds, or two contestants of one name.
    """
    if rounds < 1:
        raise ValueError(f"--rounds {rounds}: at least 1")
    if twice := [name for name, count in Counter(c.name for c in contestants).items() if count > 1]:
        raise ValueError(f"two contestants are called {twice[0]}: give each a name of its own")
    _compare_outputs(contestants, agree, on_turn)
    for contestant in contestants:
        on_turn(f"{contestant.name}: warm-up")
        _timed(contestant, 0)
    timings = []
    for number in range(1, rounds + 1):
        for contestant in contestants:
            on_turn(f"{contestant.name}: round {number} of {rounds}")
            timings.append(_timed(contestant, number))
    return timings


def _compare_outputs(contestants: Sequence[Contestant], agree: Agree | None, on_turn: OnTurn) -> None:
    if agree is None:
        return
    outputs = {}
    for contestant in contestants:
        if contestant.output is not None:
            on_turn(f"{contestant.name}: output")
            outputs[contestant.name] = contestant.output()
    for one, other in combinations(outputs, 2):
        if complaint := agree(outputs[one], outputs[other]):
            raise ValueError(f"{one} and {other} do not do the same work, so nothing was timed: {complaint}")


def _timed(contestant: Contestant, number: int) -> Timing:
    cpu, wall = cpu_seconds(), time.perf_counter()
    items = contestant.round()
    wall = time.perf_counter() - wall
    cpu = cpu_seconds() - cpu
    if contestant.between is not None:
        contestant.between()
    assert items > 0, f"{contestant.name} did nothing in a round"
    return Timing(contestant.name, number, items, wall, cpu)


def cpu_seconds() -> float:
    """User and system time so far of this process, of children that ended, and of those that live.

    The kernel's own sum holds only children that were waited for, and a loader's workers outlive a round. Theirs is
    counted in ticks of 10 ms, and read from /proc: kernels are measured where there is no psutil.
    """
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that ended in between
            # After the name, which may hold anything: state, parent, ..., own and waited-for ticks from the twelfth on.
            fields = path.read_text().rpartition(")")[2].split()
            process = int(path.parent.name)
            parents[process], ticks[process] = int(fields[1]), sum(map(int, fields[11:15]))
    below, children = 0, {os.getpid()}
    while children := {process for process, parent in parents.items() if parent in children}:
        below += sum(ticks[process] for process in children)
    return time.process_time() + ended.ru_utime + ended.ru_stime + below / os.sysconf("SC_CLK_TCK")


def summarise(
    question: str, part: str, unit: str, contestants: Sequence[Contestant], timings: Sequence[Timing]
) -> list[Row]:
    """A row for each contestant, in their order; ratios are to the first, formed turn by turn."""
    runs = {c.name: sorted((t for t in timings if t.contestant == c.name), key=lambda t: t.round) for c in contestants}
    first = runs[contestants[0].name]
    rows = []
    for c in contestants:
        own = runs[c.name]
        rate = [t.items_per_second for t in own]
        moved = c.bytes_per_item
        row = Row(
            question=question,
            part=part,
            contestant=c.name,
            settings=c.settings,
            unit=unit,
            n=len(own),
            items_per_second=spread(rate),
            wall_seconds=spread([t.wall_seconds for t in own]),
            cpu_seconds_per_item=spread([t.cpu_seconds / t.items for t in own]),
            ratio=_ratio(own, first),
            compared_with=contestants[0].name,
            gigabytes_per_second=None if moved is None else spread([r * moved / 1e9 for r in rate]),
            timings=tuple(own),
        )
        rows.append(row)
    return rows


def ratio(one: Row, other: Row) -> Spread:
    """Of items a second, one's to the other's, turn by turn; both of one part."""
    return _ratio(one.timings, other.timings)


def _ratio(one: Sequence[Timing], other: Sequence[Timing]) -> Spread:
    return spread([t.items_per_second / o.items_per_second for t, o in zip(one, other, strict=True)])


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def circumstances_of(command: Sequence[str], note: str) -> dict[str, Any]:
    """What a result depends on beside its question's own conditions. command: the words after `python`.

    Called first of all, so that the load is the others'.
    """
    from pipeline.parallel import snapshot_environment  # with it comes torch, which a reader of results need not have

    return {
        "note": note,
        "command": shlex.join(("python", *command)),
        "time_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": snapshot_environment() | {"cpu": _cpu_model()},
        "uncommitted_changes": _uncommitted_changes(),
        "load_average_1_minute": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _uncommitted_changes() -> bool | None:
    """Whether the commit alone does not tell what ran. None: unknown."""
    if told := os.environ.get("NOISYNN_COMMIT"):  # of a launched job, whose copy of the code is in no repository
        return told.endswith("+changes")
    if shutil.which("git") is None:
        return None
    words = ("git", "status", "--porcelain", "--", "*.py")
    answer = subprocess.run(words, cwd=RESULTS.parent.parent, capture_output=True, text=True, check=False)
    return bool(answer.stdout.strip()) if answer.returncode == 0 else None


def check_output(output: Path | None, question: str) -> Path:
    """The file for a question's results; called before measuring, so that no run is for nothing.

    Errors: ValueError, OSError naming the file and the mend.
    """
    path = RESULTS / f"{question}.jsonl" if output is None else output
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a .jsonl file")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--output {path}: {nearest} is no folder that can be written to; name another place")
    if path.exists():
        read_rows(path)
    return path


def append_rows(path: Path, lines: Sequence[str]) -> None:
    """Adds lines to the file by a rename, so that a kill leaves the old content or the new, never half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # two runs at once: neither loses the other's lines
        before = path.read_bytes() if path.exists() else b""
        with atomic_file(path) as file:
            file.write(before + "".join(f"{line}\n" for line in lines).encode())
    finally:
        os.close(folder)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file. Errors: ValueError naming the line that is none."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error}): name a file of results") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or "question" not in row or not line.endswith("\n"):
            raise ValueError(f"{path}, line {number} is no result: mend it, or name another file")
        rows.append(row)
    return rows


def finish(rows: Sequence[Row], circumstances: dict[str, Any], path: Path) -> None:
    """Writes the rows, then prints a table for each part of the question."""
    append_rows(path, [row.to_json(circumstances) for row in rows])
    print_parts(rows)
    print_circumstances(rows[0].n, circumstances)
    print(f"{len(rows)} rows, with versions, commit and command, added to {path}")


def print_parts(rows: Sequence[Row]) -> None:
    """A table for each part of the question."""
    for part in dict.fromkeys(row.part for row in rows):
        of_part = [row for row in rows if row.part == part]
        print_table(f"{of_part[0].question}: {part}", *table_of(of_part))


def print_circumstances(rounds: int, circumstances: dict[str, Any]) -> None:
    environment = circumstances["environment"]
    print(f"n = {rounds} rounds in turn after a warm-up; median (lowest to highest); ratio of rates, turn by turn")
    print(f"{environment['cpu']}; {environment['device']}; load {circumstances['load_average_1_minute']:.1f} at start")


def print_table(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """A table by rich, or plain lines. cells: a line for each row, as wide as the header."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # kernels are measured where it is not installed
        print("\n".join(" | ".join(line) for line in ([title], header, *cells)))
        return
    table = Table(*header, title=title, title_justify="left")
    for line in cells:
        table.add_row(*line)
    # Off a terminal rich assumes 80 columns, and would break figures in two.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(header, a line for each row) of one part."""
    wall, wall_unit = _scaled([row.wall_seconds for row in rows])
    cpu, cpu_unit = _scaled([row.cpu_seconds_per_item for row in rows])
    columns: dict[str, list[str]] = {"contestant": [row.contestant for row in rows]}
    if any(t.items > 1 for row in rows for t in row.timings):
        columns[f"{rows[0].unit}/s"] = [figures(row.items_per_second) for row in rows]
    columns[f"wall, {wall_unit} a round"] = wall
    columns[f"CPU, {cpu_unit} each"] = cpu
    if any(row.gigabytes_per_second for row in rows):
        columns["GB/s"] = [figures(row.gigabytes_per_second) if row.gigabytes_per_second else "" for row in rows]
    columns[f"rate over {rows[0].compared_with}'s"] = [figures(row.ratio) for row in rows]
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def _scaled(spreads: Sequence[Spread]) -> tuple[list[str], str]:
    factor, unit = unit_of_time(max(s.median for s in spreads))
    return [figures(Spread(*(value * factor for value in s))) for s in spreads], unit


def unit_of_time(most_seconds: float) -> tuple[float, str]:
    """(units in a second, its name) of the largest in which so many seconds are at least 1."""
    units = ((1.0, "s"), (1e3, "ms"), (1e6, "us"), (1e9, "ns"))
    return next(((f, u) for f, u in units if most_seconds * f >= 1), units[-1])


def figures(value: Spread) -> str:
    """A median, and in brackets the lowest and the highest."""
    return f"{figure(value.median)} ({figure(value.min)} to {figure(value.max)})"


def figure(value: float) -> str:
    """Three digits, or whole from 100 on."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@contextlib.contextmanager
def status_line() -> Iterator[OnTurn]:
    """Yields on_turn: shows what runs on a terminal's standard error; nothing elsewhere, and nothing without rich."""
    try:
        from rich.console import Console
    except ImportError:
        Console = None  # type: ignore[assignment,misc]
    if Console is None or not sys.stderr.isatty():
        yield _silent
        return
    with Console(stderr=True).status("starting") as status:
        yield status.update
