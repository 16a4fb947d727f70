"""The page of a sweep: figures, table, costs, and the best configuration as a command to paste."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from raysl.errors import UserError
from raysl.report.command import command
from raysl.storage import Folder
from raysl.sweep import table
from raysl.sweep.record import Record

if TYPE_CHECKING:
    from raysl.report.figures import Figure

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .6rem; text-align: right }
th { border-bottom: 1px solid #888 } tr:nth-child(even) { background: #f4f4f4 } td.why { text-align: left }
pre { background: #f4f4f4; padding: .8rem; white-space: pre-wrap } img { max-width: 100% }
figure { margin: 1.5rem 0 } .figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)) }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
{% if command %}<h2>Best</h2><p>{{ best }}</p><pre>{{ command }}</pre>{% endif %}
<h2>Trials</h2>
<table><tr><th>trial</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}
<th>{{ probe }}</th><th>±</th><th>epoch</th><th></th></tr>
{% for row in rows %}<tr>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}
<td class="why">{{ row.why }}</td></tr>
{% endfor %}</table>
<div class="figures">{% for figure in figures %}<figure><h2>{{ figure.title }}</h2>
<img alt="{{ figure.title }}" src="data:image/png;base64,{{ figure.data }}">
<figcaption>{{ figure.text }}</figcaption></figure>
{% endfor %}</div>
<h2>Cost</h2><p>{{ cost }}</p>
</body></html>
"""


@dataclass(frozen=True)
class ReportConfig:
    """Writes the report of a sweep, finished or not: one page that holds all it needs, and its figures.

    Args:
        out: folder for index.html and the figures; `report` in the sweep by default.
        core_hour: price of a CPU for an hour, in whatever currency.
        gpu_hour: price of a GPU for an hour.
    """

    out: str = ""
    core_hour: float = 0.0
    gpu_hour: float = 0.0


def report(sweep: str, config: ReportConfig) -> Folder:
    """Writes the report of the sweep at `sweep`, and returns where. The same sweep gives the same bytes.

    Raises:
        UserError: there is no sweep, a package is missing, or the report cannot be written.
    """
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"A report needs {' and '.join(missing)}, which is not installed. Install raysl[report]."
        )
    from raysl.report.figures import figures

    record = Record.open(sweep)
    out = Folder(config.out) if config.out else record.folder / "report"
    drawn = list(figures(record))
    for figure in drawn:
        out.write(f"{figure.name}.png", figure.png)
    out.write("index.html", _page(record, drawn, config).encode())
    return out


def _page(record: Record, drawn: Sequence[Figure], config: ReportConfig) -> str:
    import jinja2

    standing = record.standing
    rows = table.rows(standing)
    names = [d.name for d in standing.space.dimensions]
    states = [row["state"] for row in rows]
    test = record.uris["test"].rpartition("/")[2]
    best = record.best()
    top = next((row for row in rows if row["trial"] == standing.best()), None)
    return (
        jinja2.Environment(autoescape=True)
        .from_string(_TEMPLATE)
        .render(
            title=f"{record.base.method}: {', '.join(names)}",
            summary=(
                f"{len(rows)} trials of {len(standing.config.seeds)} seeds, {record.base.epochs:g} epochs, scored by "
                f"{standing.config.probe} on {test}; searcher {standing.config.searcher}, scheduler "
                f"{standing.config.scheduler}. Finished {states.count('finished')}, stopped {states.count('stopped')}, "
                f"failed {states.count('failed')}."
            ),
            best=top and f"Trial {top['trial']}: {table.described(top['values'])}, {_score(top)}.",
            command=best and command(replace(best, data="DATA", run="RUN", seed=standing.config.seeds[0])),
            names=names,
            probe=standing.config.probe,
            rows=[_row(row, names, record.base.epochs) for row in rows],
            figures=[
                {"title": f.title, "text": f.text, "data": base64.b64encode(f.png).decode()} for f in drawn
            ],
            cost=_cost(record, config),
        )
    )


def _score(row: dict[str, Any]) -> str:
    spread = "" if row["spread"] is None else f" ± {row['spread']:.4f}"
    return f"{row['score']:.4f}{spread}"


def _row(row: dict[str, Any], names: Sequence[str], epochs: float) -> dict[str, Any]:
    cells = [
        str(row["trial"]),
        *(table.shown(row["values"][name]) if row["values"] else "" for name in names),
    ]
    cells.append("" if row["score"] is None else f"{row['score']:.4f}")
    cells.append("" if row["spread"] is None else f"{row['spread']:.4f}")
    return {"cells": [*cells, f"{epochs * row['share']:.3g}"], "why": row["reason"] or row["state"]}


def _cost(record: Record, config: ReportConfig) -> str:
    """Core-hours and GPU-hours that the runs held, without those of sessions that were killed."""
    rows = record.journal.of("score")
    cores = sum(row["seconds"] * row["cpus"] for row in rows) / 3600
    gpus = sum(row["seconds"] * row["gpus"] for row in rows) / 3600
    hours = sum(row["seconds"] for row in rows) / 3600
    text = f"{hours:.2f} hours of runs, one after the other: {cores:.2f} core-hours and {gpus:.2f} GPU-hours"
    if config.core_hour or config.gpu_hour:
        text += f", which cost {cores * config.core_hour + gpus * config.gpu_hour:.2f}"
    return f"{text}. What was lost when a session was killed is not counted."
