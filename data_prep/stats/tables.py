"""The tables of `stats`, the same for the terminal and for the page."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from data_prep.keys import printable
from data_prep.stats.describe import ClassCount, SplitStats
from data_prep.stats.duplicates import Count, Duplicates, Group

CLASSES_SHOWN = 3  # smallest and largest
GROUPS_PRINTED = 10  # the page and the JSON name all that --listed asked for
WIDTH_OFF_TERMINAL = 140
_QUANTITIES = {
    "width": ("width, px", 0),
    "height": ("height, px", 0),
    "shorter_side": ("shorter side, px", 0),
    "aspect_ratio": ("width / height", 2),
    "bytes": ("bytes", 0),
    "bits_per_pixel": ("bits a pixel", 2),
}


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `words` columns are words, the others figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    note: str = ""


def summary_tables(splits: Sequence[SplitStats], duplicates: Duplicates) -> list[Table]:
    """All tables but the lists of duplicates."""
    tables = [_splits(splits), _spreads(splits), _sizes(splits), _forms(splits), _classes(splits)]
    if any(split.repaired or split.skipped for split in splits):
        tables.append(_notes(splits))
    return [*tables, _duplicates(splits, duplicates)]


def duplicate_tables(found: Duplicates, groups: int | None = None) -> list[Table]:
    """The groups of equal pictures, at most `groups` of each kind (None: all that are listed)."""
    kinds = (
        ("Same picture, two classes or more", found.two_classes, found.groups_of_two_classes),
        ("Same picture, same class", found.one_class, found.groups - found.groups_of_two_classes),
    )
    return [_listed(title, listed[:groups], total) for title, listed, total in kinds if listed[:groups]]


def how_counted(splits: Sequence[SplitStats], found: Duplicates) -> list[str]:
    """What the figures rest on, in sentences."""
    lines = [
        "Sizes, colour forms and progressive scans stand in each picture's own header. EXIF rotation is not applied.",
        "Duplicates have the same bytes. Only pictures of the same size and CRC-32 can be equal, by the shards' "
        f"indexes; the {found.compared:,} such were compared by 128 bits of their sha256, and "
        f"{found.compared - found.collisions:,} of them are equal to another.",
        "The same picture encoded twice has other bytes, and is not found.",
    ]
    whole = sum(split.read_whole for split in splits)
    if whole:
        lines.append(
            f"{whole:,} pictures were read whole, for their indexes hold no CRCs (see `index --hash`), or they lie in "
            "a store."
        )
    return lines


def as_text(splits: Sequence[SplitStats], duplicates: Duplicates, page: Path | None) -> str:
    """Everything for a terminal, or for a log."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH_OFF_TERMINAL
    file = io.StringIO()
    # Names of classes and keys may hold what rich would take for markup.
    console = Console(file=file, width=width, markup=False, highlight=False, emoji=False)
    for table in (*summary_tables(splits, duplicates), *duplicate_tables(duplicates, GROUPS_PRINTED)):
        shown = RichTable(title=table.title, title_justify="left", title_style="bold")
        for number, name in enumerate(table.header):
            shown.add_column(name, justify="left" if number < table.words else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        if table.note:
            console.print(table.note)
    for line in how_counted(splits, duplicates):
        console.print(line)
    if page is not None:
        console.print(f"page: {page}", soft_wrap=True)
    return file.getvalue().rstrip("\n")


def _splits(splits: Sequence[SplitStats]) -> Table:
    rows = tuple(
        (
            printable(split.name),
            f"{split.pictures:,}",
            f"{split.bytes / 1e6:,.1f}",
            f"{split.shards:,}",
            f"{split.shard_bytes / 1e6:,.1f}",
            f"{len(split.classes):,}",
            f"{sum(split.repaired.values()):,}",
            f"{sum(split.skipped.values()):,}",
        )
        for split in splits
    )
    header = ("split", "pictures", "their MB", "shards", "shards' MB", "classes", "repaired", "skipped")
    return Table("Splits", header, rows)


def _spreads(splits: Sequence[SplitStats]) -> Table:
    rows = []
    for what, (name, digits) in _QUANTITIES.items():
        for split in splits:
            spread = split.spreads[what]
            values = (spread.min, spread.percentile_5, spread.median, spread.percentile_95, spread.max, spread.mean)
            rows.append((name, printable(split.name), *(f"{value:,.{digits}f}" for value in values)))
    return Table("Pictures", ("", "split", "least", "5 %", "median", "95 %", "most", "mean"), tuple(rows), words=2)


def _sizes(splits: Sequence[SplitStats]) -> Table:
    rows = tuple(
        (printable(split.name), f"{size.width} x {size.height}", *_share(size.pictures, split))
        for split in splits
        for size in split.sizes
    )
    different = ", ".join(f"{split.different_sizes:,} in {printable(split.name)}" for split in splits)
    note = f"Different sizes: {different}."
    return Table("Most common sizes", ("split", "width x height", "pictures", "share"), rows, words=2, note=note)


def _forms(splits: Sequence[SplitStats]) -> Table:
    rows = []
    for split in splits:
        rows += [(printable(split.name), form, *_share(count, split)) for form, count in split.forms.items()]
        rows.append((printable(split.name), "progressive, of all", *_share(split.progressive, split)))
    return Table("Colour forms", ("split", "form", "pictures", "share"), tuple(rows), words=2)


def _share(count: int, split: SplitStats) -> tuple[str, str]:
    return f"{count:,}", f"{100 * count / split.pictures:.2f} %"


def _classes(splits: Sequence[SplitStats]) -> Table:
    rows: list[tuple[str, ...]] = []
    for split in splits:
        # The first of equals come first at both ends.
        smallest = sorted(split.classes, key=lambda found: found.pictures)[:CLASSES_SHOWN]
        largest = sorted(split.classes, key=lambda found: -found.pictures)[:CLASSES_SHOWN]
        for kind, found in (("smallest", smallest), ("largest", largest)):
            rows += [(printable(split.name), kind, class_name(one), f"{one.pictures:,}") for one in found]
    note = "; ".join(_class_sizes(split) for split in splits) + "."
    return Table("Classes", ("split", "", "class", "pictures"), tuple(rows), words=3, note=note)


def _class_sizes(split: SplitStats) -> str:
    counts = sorted(found.pictures for found in split.classes)
    middle = (counts[(len(counts) - 1) // 2] + counts[len(counts) // 2]) / 2
    return f"{printable(split.name)}: {len(counts):,} classes of {counts[0]:,} to {counts[-1]:,}, median {middle:,.10g}"


def class_name(found: ClassCount) -> str:
    return printable(f"{found.name} ({found.readable})" if found.readable else found.name)


def _notes(splits: Sequence[SplitStats]) -> Table:
    rows = tuple(
        (printable(split.name), kind, printable(reason), f"{count:,}")
        for split in splits
        for kind, reasons in (("repaired", split.repaired), ("skipped", split.skipped))
        for reason, count in reasons.items()
    )
    return Table("Repaired and skipped", ("split", "", "reason", "pictures"), rows, words=3)


def _duplicates(splits: Sequence[SplitStats], found: Duplicates) -> Table:
    rows = [(printable(c.place), f"{c.groups:,}", _pictures(c), f"{c.groups_of_two_classes:,}") for c in found.counts]
    if len(splits) > 1:
        rows.append(("in all", f"{found.groups:,}", f"{found.pictures:,}", f"{found.groups_of_two_classes:,}"))
    header = ("equal pictures", "groups", "pictures in them", "groups of two classes or more")
    return Table("Duplicates", header, tuple(rows))


def _pictures(count: Count) -> str:
    return " and ".join(f"{pictures:,}" for pictures in count.pictures)


def _listed(title: str, groups: Sequence[Group], total: int) -> Table:
    rows = tuple(row for number, group in enumerate(groups, start=1) for row in _rows(number, group))
    note = f"{len(groups):,} of {total:,} groups are shown; --listed says how many the page and the JSON name."
    note = "" if len(groups) == total else note
    return Table(title, ("group", "split", "sample", "key", "class", "shard", "bytes"), rows, words=6, note=note)


def _rows(number: int, group: Group) -> Iterator[tuple[str, ...]]:
    for copy in group.copies:
        names = (printable(name) for name in (copy.key, copy.class_name, copy.shard))
        yield (f"{number}", printable(copy.split), f"{copy.sample_id}", *names, f"{group.size:,}")
    if (more := group.pictures - len(group.copies)) > 0:
        yield (f"{number}", f"and {more:,} more", "", "", "", "", f"{group.size:,}")
