"""Writes a report, of a sweep or of runs, as what lies in the folders says."""

from __future__ import annotations

import base64
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raysl.errors import UserError
from raysl.storage import Folder
from raysl.sweep.journal import NAME as JOURNAL

if TYPE_CHECKING:
    from raysl.report.picture import Figure

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


def check_installed() -> None:
    """Raises UserError when a package is missing that reports are made with."""
    missing = [name for name in ("matplotlib", "jinja2", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"A report needs {' and '.join(missing)}, which is not installed. Install raysl[report]."
        )


def report(folders: str | Sequence[str], config: ReportConfig) -> Folder:
    """Writes the report of a sweep, finished or not, or of one or more runs, and returns where. The same sweep or runs
    give the same bytes.

    Args:
        folders: of one sweep; or of runs, or of other people's models that `raysl probe` has measured.
        config: see `ReportConfig`.

    Raises:
        UserError: there is neither sweep nor run, several sweeps are given, a package is missing, or the report cannot
            be written.
    """
    check_installed()
    places = [folders] if isinstance(folders, str) else list(folders)
    sweeps = [place for place in places if Folder(place).exists(JOURNAL)]
    if sweeps and len(places) > 1:
        raise UserError(
            f"The folder {sweeps[0]!r} holds a sweep, and {len(places)} folders were given. Give one sweep, or runs "
            "alone."
        )
    if sweeps:
        from raysl.report import sweep_page

        page, drawn = sweep_page.page(sweeps[0], config)
    else:
        from raysl.report import runs_page

        page, drawn = runs_page.page(places, config)
    out = Folder(config.out or ("report" if len(places) > 1 else f"{places[0].rstrip('/')}/report"))
    for figure in drawn:
        out.write(f"{figure.name}.png", figure.png)
    out.write("index.html", page.encode())
    return out


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
