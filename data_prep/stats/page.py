"""The page of `stats`: one HTML file, its plots inside, nothing from the network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2

from data_prep.keys import printable
from data_prep.manifest import atomic_file
from data_prep.stats.describe import SplitStats
from data_prep.stats.duplicates import Duplicates
from data_prep.stats.plots import aspect_svg, bits_svg, bytes_svg, classes_svg, sides_svg
from data_prep.stats.tables import duplicate_tables, how_counted, summary_tables

# Table -> the plots below it: words for those who do not see it, and how it is drawn.
_PLOTS = {
    "Pictures": (
        ("Shares of pictures over width divided by height", aspect_svg),
        ("Shares of pictures over the size of their files", bytes_svg),
        ("Shares of pictures over bits a pixel", bits_svg),
    ),
    "Most common sizes": (("Pictures over width and height, in each split", sides_svg),),
    "Classes": (("Pictures of each class, the largest class first", classes_svg),),
}


def write_page(splits: Sequence[SplitStats], duplicates: Duplicates, output: Path) -> None:
    """Writes the page whole, or not at all."""
    text = render(splits, duplicates)
    with atomic_file(output) as file:
        file.write(text.encode())


def render(splits: Sequence[SplitStats], duplicates: Duplicates) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of classes and keys may hold anything
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [printable(split.name) for split in splits]
    sections = [
        (table, [(words, _uri(draw(splits))) for words, draw in _PLOTS.get(table.title, ())])
        for table in summary_tables(splits, duplicates)
    ]
    return environment.get_template("page.html.j2").render(
        title=f"Pictures of {' and '.join(names)}",
        sections=sections,
        lists=duplicate_tables(duplicates),
        duplicates=duplicates,
        pictures=sum(split.pictures for split in splits),
        manifests=[(name, printable(split.manifest)) for name, split in zip(names, splits, strict=True)],
        how=how_counted(splits, duplicates),
    )


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
