"""What every report stands on: its settings, and one page that holds all it needs."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysl.reporting.figure import Figure

_BASE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .6rem; text-align: right }
th { border-bottom: 1px solid #888 } tr:nth-child(even) { background: #f4f4f4 } td.why { text-align: left }
caption { text-align: left; color: #666 } tr.best { font-weight: 600 }
.wide { overflow-x: auto }
pre { background: #f4f4f4; padding: .8rem; white-space: pre-wrap } img { max-width: 100% }
figure { margin: 1.5rem 0 } .figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)) }
</style></head><body>
<h1>{{ title }}</h1>
{% macro pictures(figures) %}{% for figure in figures %}<figure><h3>{{ figure.title }}</h3>
<img alt="{{ figure.title }}" src="data:image/png;base64,{{ figure.data }}">
<figcaption>{{ figure.text }}</figcaption></figure>
{% endfor %}{% endmacro %}
"""


@dataclass(frozen=True)
class ReportConfig:
    """Writes a report: one page that holds all it needs, and its figures.

    Args:
        out: folder for index.html and the figures; by default `report` in the folder of the sweep or of the one run,
            and for several runs `report` where the command is given.
        core_hour: price of a CPU for an hour, in whatever currency; of a sweep.
        gpu_hour: price of a GPU for an hour; of a sweep.
        images: of which the views are drawn for each method; 0 to leave them out.
    """

    out: str = ""
    core_hour: float = 0.0
    gpu_hour: float = 0.0
    images: int = 3


def render(body: str, title: str, **values: Any) -> str:
    """A page.

    Args:
        body: a template of Jinja that ends the page; `pictures` in it is a macro for what `embedded` gives.
        title: of the page.
        values: of the names in the template.
    """
    import jinja2

    # No new line at the end of a block, so that tables are one line a row.
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters["breakable"] = _breakable
    return environment.from_string(f"{_BASE}{body}</body></html>\n").render(title=title, **values)


def _breakable(name: str) -> Any:
    """A long name with places at which a browser may break it."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"([._/])", r"\1<wbr>", str(markupsafe.escape(name))))


def embedded(figures: Sequence[Figure]) -> list[dict[str, str]]:
    """Figures for the template, with their pictures in them."""
    return [{"title": f.title, "text": f.text, "data": base64.b64encode(f.png).decode()} for f in figures]
