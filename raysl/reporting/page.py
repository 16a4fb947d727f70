"""Render a report as one HTML page with its pictures inside."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Annotated, Any

from raysl.fields import Bounds, CheckedTop

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
figure { margin: 1.5rem 0 }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)) }
</style></head><body>
<h1>{{ title }}</h1>
{% macro pictures(figures) %}{% for figure in figures %}<figure><h3>{{ figure.title }}</h3>
<img alt="{{ figure.title }}" src="data:image/png;base64,{{ figure.png | base64 }}">
<figcaption>{{ figure.text }}</figcaption></figure>
{% endfor %}{% endmacro %}
"""


@dataclass(frozen=True)
class ReportConfig(CheckedTop):
    """Write a report: one self-contained page, and its figures as files.

    Args:
        out: folder for index.html and the figures; default: `report` in the folder of the sweep or run, and for
            several runs `report` in the working directory.
        core_hour: price of a CPU core per hour, in any currency; used for sweeps.
        gpu_hour: price of a GPU per hour, in the same currency; used for sweeps.
        images: number of images whose views are drawn for each method; 0 draws none.
    """

    out: str = ""
    core_hour: Annotated[float, Bounds(0, 1e9)] = 0.0
    gpu_hour: Annotated[float, Bounds(0, 1e9)] = 0.0
    images: Annotated[int, Bounds(0, 10_000)] = 3


def render(body: str, title: str, **values: Any) -> str:
    """Return an HTML page of a Jinja template of its body, which has a macro `pictures` of figures."""
    import jinja2

    # Blocks end without a new line, so that a table row is one line.
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {"breakable": _breakable, "base64": lambda data: base64.b64encode(data).decode()}
    return environment.from_string(f"{_BASE}{body}</body></html>\n").render(title=title, **values)


def _breakable(name: str) -> Any:
    """Return a long name with places at which a browser may break it."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"([._/])", r"\1<wbr>", str(markupsafe.escape(name))))
