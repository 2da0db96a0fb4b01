"""Pages: one self-contained HTML file each, by templates that extend base.html.j2, with plots inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: Path, filters: dict[str, Callable[..., Any]], **values: Any) -> str:
    """The page that a template file makes of values. filters: more functions for it, by name."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _TEMPLATES]),
        autoescape=True,  # a folder's name may hold anything
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template.name).render(**values)
