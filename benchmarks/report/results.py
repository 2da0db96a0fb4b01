"""Lines of results files: the newest of each measurement, and nothing side by side that does not compare."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Row, read_rows

_NONE = type(None)
_CIRCUMSTANCES: dict[str, tuple[type, ...]] = {
    "command": (str,),
    "time_utc": (str,),
    "environment": (dict,),
    "uncommitted_changes": (bool, _NONE),
    "load_average_1_minute": (int, float, _NONE),
    "note": (str,),
}
# Which line of its table a row is, by those of these that it has.
_NAMES = ("contestant", "test", "what", "ranks", "gpus", "seed")
_PEERS = "versions_of_peers."


class Source(NamedTuple):
    """One run of a command, and what its figures depend on."""

    command: str
    time_utc: str
    """Nothing where it was not kept."""
    commit: str
    uncommitted_changes: bool | None
    load: float | None
    """Of one minute, as it began."""
    hardware: str
    versions: str
    note: str

    @property
    def when(self) -> str:
        return f"{self.time_utc[:10]} {self.time_utc[11:16]} UTC" if self.time_utc else ""

    @property
    def code(self) -> str:
        changes = {True: "and uncommitted changes", False: "without changes", None: "changes unknown"}
        return f"commit {self.commit[:10]} {changes[self.uncommitted_changes]}"

    @property
    def circumstances(self) -> str:
        """All but the command, in one line."""
        load = "" if self.load is None else f"load {self.load:.1f} at start"
        parts = (self.when, self.hardware, load, self.note, self.code, self.versions)
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Result:
    """One line of a results file."""

    row: dict[str, Any]
    file: Path
    line: int

    def __getitem__(self, name: str) -> Any:
        """Errors: ValueError naming file and line where the row has no such field."""
        if name not in self.row:
            raise ValueError(f"{self.where} has no {name!r}: measure it again, or take the line out")
        return self.row[name]

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.line}"

    @property
    def question(self) -> str:
        return str(self["question"])

    @property
    def part(self) -> str:
        return str(self.row.get("part", ""))

    @property
    def name(self) -> str:
        return ", ".join(str(self.row[name]) for name in _NAMES if name in self.row)

    @property
    def conditions(self) -> dict[str, Any]:
        return self.row.get("conditions") or {}

    def condition(self, name: str) -> Any:
        """Errors: ValueError naming file and line."""
        if name not in self.conditions:
            raise ValueError(f"{self.where} has no condition {name!r}: measure it again, or take the line out")
        return self.conditions[name]

    def number(self, name: str) -> float:
        """A condition that is a figure. Errors: ValueError naming file and line."""
        value = self.condition(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.where} is damaged ({name} is {value!r}): take it out, or measure it again")
        return value

    @property
    def place(self) -> str:
        """Where it was measured, as far as that makes another measurement: the card's name, or `cpu`."""
        device = self.condition("device")
        return str(self["environment"].get("device", device) if device == "cuda" else device)

    @property
    def versions(self) -> dict[str, str]:
        """Hardware, and all that was installed; the code's own commit may differ, and is shown."""
        return {name: value for name, value in self["environment"].items() if name != "commit"}

    @property
    def source(self) -> Source:
        hardware, versions = machine_of(self["environment"])
        return Source(
            command=self["command"],
            time_utc=self["time_utc"],
            commit=self["environment"].get("commit", "unknown"),
            uncommitted_changes=self["uncommitted_changes"],
            load=self["load_average_1_minute"],
            hardware=hardware,
            versions=versions,
            note=self["note"],
        )

    @property
    def timed(self) -> Row:
        """As `harness.summarise` has made it. Errors: ValueError naming file and line."""
        try:
            return Row.from_json(self.row)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.where} is no timing ({error}): measure it again, or take the line out") from error


def read_results(folder: Path) -> list[Result]:
    """Every line of the *.jsonl of a folder. Errors: ValueError, OSError naming file, line and the mend."""
    if not folder.is_dir():
        raise ValueError(f"--results {folder} is no folder: name one with *.jsonl of `python -m benchmarks`")
    results = [
        Result(row, path, number)
        for path in sorted(folder.glob("*.jsonl"))
        for number, row in enumerate(read_rows(path), start=1)
    ]
    for result in results:
        odd = [name for name, kinds in _CIRCUMSTANCES.items() if not isinstance(result[name], kinds)]
        odd += [] if isinstance(result.conditions, dict) else ["conditions"]
        try:
            if odd:
                raise TypeError(odd[0])
            datetime.datetime.fromisoformat(result["time_utc"])
            machine_of(result["environment"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{result.where} does not say when or where it was measured: take it out") from error
    return results


class Alike(NamedTuple):
    """What results share that stand in one table: hardware, versions and conditions, and what this says."""

    within: tuple[str, ...] = ()
    """Names of conditions in which they differ by intent."""
    means: bool = False
    """A line is a mean over several of them, so their code is the same too."""
    all_parts: bool = False
    """The table is of all parts of a variant; else each part has its own."""


ALIKE = Alike()


class Selected(NamedTuple):
    chosen: list[Result]
    superseded: list[Result]


def select(results: Sequence[Result], variant: Callable[[Result], str], alike: Alike, latest: bool) -> Selected:
    """The newest result of each (variant, part, name) of one question.

    variant: what makes a result another measurement, and not a newer one of the same. latest: of each table the newest
    result, and those that compare with it, whenever they were measured: a grid that was resumed stays whole.
    """
    kept: set[int] = set()
    found: set[tuple[str, ...]] = set()
    in_table: dict[tuple[str, ...], list[Result]] = {}
    for result in sorted(reversed(results), key=_moment, reverse=True):  # of one time the last line counts
        key = (variant(result), result.part, result.name)
        table = in_table.setdefault(key[:1] if alike.all_parts else key[:2], [])
        if key in found or (latest and any(any(_differences(other, result, alike)) for other in table)):
            continue
        found.add(key)
        table.append(result)
        kept.add(id(result))
    return Selected(
        [result for result in results if id(result) in kept], [result for result in results if id(result) not in kept]
    )


def _moment(result: Result) -> str:
    return datetime.datetime.fromisoformat(result["time_utc"]).astimezone(datetime.UTC).isoformat()


def check_alike(results: Sequence[Result], alike: Alike) -> None:
    """Refuses to put into one table what does not compare. Errors: ValueError with the mend."""
    for other in results[1:]:
        for name, one, another in _differences(results[0], other, alike):
            raise ValueError(
                f"{other.file}: {other.question}{f', {other.part}' if other.part else ''}: {name} {one} "
                f"({results[0].source.when}) and {another} ({other.source.when}) would stand in one table: "
                "--latest takes the newest and what compares with it, or measure all of it again"
            )


def _differences(one: Result, other: Result, alike: Alike) -> Iterator[tuple[str, Any, Any]]:
    a, b = (
        {"code": r.row.get("code") if alike.means else None, "compared with": r.row.get("compared_with")}
        | r.versions
        | dict(_flat(r.conditions))
        for r in (one, other)
    )
    for name in dict.fromkeys([*a, *b]):
        only_in_one = name not in a or name not in b
        # A run of some contestants says nothing of the others' versions.
        of_a_peer_left_out = only_in_one and name.startswith(_PEERS)
        shown = name.removeprefix(_PEERS)
        if a.get(name) != b.get(name) and not of_a_peer_left_out and shown not in alike.within:
            yield shown, a.get(name), b.get(name)


def _flat(conditions: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in conditions.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def machine_of(environment: dict[str, str]) -> tuple[str, str]:
    """(hardware, versions) in words."""
    known = {name: value for name, value in environment.items() if name != "commit" and value != "not installed"}
    hardware = [known.pop(name) for name in ("device", "cpu") if name in known]
    return ", ".join(hardware) or "unknown hardware", ", ".join(f"{name} {value}" for name, value in known.items())


def sources_of(results: Sequence[Result]) -> tuple[Source, ...]:
    """The runs that results are of, each once."""
    return tuple(dict.fromkeys(result.source for result in results))
