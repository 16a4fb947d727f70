"""Write the page that compares runs: tables with intervals, curves, views and cost."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from raysl.config.command import wrapped
from raysl.dataset import DataSet
from raysl.errors import UserError, counted
from raysl.evaluation.results import verdicts
from raysl.reporting import pictures, retrieval_grid, run_figures
from raysl.reporting.figure import Figure
from raysl.reporting.page import ReportConfig, render
from raysl.reporting.report_runs import Group, LabeledRow, ReportRun, groups, labeled_rows, newest_rows
from raysl.reporting.tables import Estimate, Table, tables
from raysl.training.progress_actor import format_duration

# Names of measures whose highest value is the best; a spread such as top1_std has no best value.
_BETTER_IF_MORE = re.compile(r"(top\d+|m?AP\d*|precision)([/@,].*)?")

_BODY = """<p>{{ summary }}</p>
{% macro table(table) %}<div class="wide"><table><caption>{{ table.caption }}</caption>
<tr><th></th>{% for name in table.columns %}<th>{{ name | breakable }}</th>{% endfor %}<th>seeds</th></tr>
{% for line in table.lines %}<tr><td class="why">{{ line.label }}</td>{% for cell in line.cells %}<td>{{ cell }}</td>
{% endfor %}<td>{{ line.seeds }}</td></tr>
{% endfor %}</table></div>{% endmacro %}
<h2>Probes</h2>
<p>Means over seeds ± half the width of their 95 % confidence interval. “Best” marks the highest mean of a column; “=”
marks a tie with it (no significant difference by Welch's t test at 5 %, without correction for multiple comparisons).
A single seed has neither. Results of different protocols or images never share a table.</p>
{% for one in verdicts %}<p>{{ one }}</p>{% endfor %}
{% for one in primary_tables %}<h3>{{ one.probe }}</h3>{{ table(one) }}{% endfor %}
{% if others %}<details><summary>All other numbers</summary>
{% for one in others %}<h3>{{ one.probe }}</h3>{{ table(one) }}{% endfor %}</details>{% endif %}
{{ pictures(figures) }}
{% if grids %}<h2>Nearest images</h2>{{ pictures(grids) }}{% endif %}
{% if views or unseen %}<h2>What each method saw</h2>{{ pictures(views) }}<p>{{ unseen }}</p>{% endif %}
<h2>Cost</h2>
<table><tr><th></th><th>runs</th><th>images</th><th>wall time</th><th>worker-hours</th><th>images/s</th></tr>
{% for line in costs %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>Time between rows of metrics, without start-up, waiting for checkpoints, and lost steps. The time of a student does
not include its teacher.</p>
<h2>Runs</h2>
{% for line in runs %}<p>{{ line.label }}: {{ line.folder }}</p><pre>{{ line.command }}</pre>
{% endfor %}
"""


def page(places: Sequence[str], config: ReportConfig) -> tuple[str, list[Figure]]:
    """Return the page of runs, and its figures. Raises UserError as `raysl.reporting.report_runs.groups`."""
    gathered = groups(places)
    rows = labeled_rows(gathered)
    drawn = [
        *run_figures.per_layer(rows),
        *run_figures.histograms(gathered),
        *run_figures.invariance_map(rows),
        *run_figures.progress(gathered),
        *run_figures.losses(gathered),
    ]
    grids = list(_grids(gathered))
    views, unseen = _views(gathered, config.images)
    text = render(
        _BODY,
        title=f"{len(gathered)} representations" if len(gathered) > 1 else gathered[0].label,
        summary=_summary(gathered, rows),
        verdicts=list(_verdicts(gathered)),
        primary_tables=[_shown(table) for table in tables(rows)],
        others=[_shown(table) for table in tables(rows, primary=False)],
        figures=drawn,
        grids=grids,
        views=views,
        unseen=unseen,
        costs=list(_costs(gathered)),
        runs=[
            {
                "label": f"{group.label}, seed {member.seed}",
                "folder": str(member.run.folder),
                "command": wrapped(member.command()),
            }
            for group in gathered
            for member in group.runs
        ],
    )
    return text, [*drawn, *grids, *views]


def _summary(gathered: Sequence[Group], rows: Sequence[LabeledRow]) -> str:
    folders, lines = sum(len(group.runs) for group in gathered), len(gathered)
    text = (
        f"{counted(folders, 'folder')} in {counted(lines, 'row')}; runs that differ only in seed and folder share a "
        "row."
    )
    bare = [group.label for group in gathered if not any(item.label == group.label for item in rows)]
    if bare:
        text += f" Not probed yet (use `raysl probe`): {', '.join(bare)}."
    return text


def _verdicts(gathered: Sequence[Group]) -> Iterator[str]:
    """Yield what `raysl probe` says of single runs. Older rows have no number of test images."""
    for group in gathered:
        if len(group.runs) == 1:
            rows = [row for row in newest_rows(group.runs[0].rows) if row.get("num_test")]
            yield from (f"{group.label}: {said}" if len(gathered) > 1 else said for said in verdicts(rows))


def _shown(table: Table) -> dict[str, Any]:
    one_name = len({name for _, name in table.columns}) == 1
    one_layer = len({layer for layer, _ in table.columns}) == 1
    parts = [(() if one_layer and not one_name else (layer,)) + (name,) for layer, name in table.columns]
    lines = []
    for label, cells in table.lines:
        shown = [_cell(table, i, cell) if cell else "" for i, cell in enumerate(cells)]
        seeds = max((len(cell.values) for cell in cells if cell), default=0)
        lines.append({"label": label, "cells": shown, "seeds": seeds})
    caption = table.caption + (f", layer {table.columns[0][0]}" if one_layer and not one_name else "")
    columns = [" ".join(names) for names in parts]
    return {"probe": table.probe, "caption": caption, "columns": columns, "lines": lines}


def _cell(table: Table, column: int, cell: Estimate) -> str:
    if not _BETTER_IF_MORE.fullmatch(table.columns[column][1]) or not table.compared(column):
        return str(cell)
    if cell == table.best(column):
        return f"{cell} best"
    return f"{cell} =" if table.tied(column, cell) else str(cell)


def _grids(gathered: Sequence[Group]) -> Iterator[Figure]:
    for group in gathered:
        for member in group.runs:
            folder = member.run.folder / retrieval_grid.GRIDS
            for name in _newest(folder.list()):
                title = f"{group.label}, seed {member.seed}: {name.removesuffix('.png')}"
                text = "A query image, and the nearest images by the cosine of their features."
                yield Figure(f"nearest-{_short(title)}", title, text, folder.read(name))


def _newest(names: Sequence[str]) -> list[str]:
    """Return the grid of the newest step for each pair of data sets. See `raysl.reporting.retrieval_grid.grid_name`."""
    steps: dict[str, int] = {}
    for grid in filter(None, (re.fullmatch(r"step-(\d+)(-.+\.png)", name) for name in names)):
        steps[grid[2]] = max(steps.get(grid[2], 0), int(grid[1]))
    return [f"step-{step}{data}" for data, step in steps.items()]


def _views(gathered: Sequence[Group], count: int) -> tuple[list[Figure], str]:
    """Return a grid for each group of runs, and a sentence about the groups that could not be drawn."""
    made, absent = [], []
    for group in gathered:
        member = group.runs[0]
        if count < 1 or not member.trained:
            continue
        try:
            config = member.run.config()
            dataset = DataSet.open(member.run.metadata()["data"]["uri"])
            grid = pictures.views_grid(dataset, pictures.views_of(config, dataset), config.seed, count)
        except (UserError, OSError) as error:
            absent.append(f"The views of {group.label} are not drawn: {error}")
            continue
        text = f"Images of the data set and the views that {config.method} makes of them in epoch 0."
        made.append(Figure(f"views-{_short(group.label)}", group.label, text, pictures.png(grid)))
    return made, " ".join(absent)


def _short(title: str) -> str:
    return hashlib.blake2b(title.encode(), digest_size=4).hexdigest()


def _costs(gathered: Sequence[Group]) -> Iterator[list[str]]:
    for group in gathered:
        spans = [_span(member) for member in group.runs if member.trained]
        wall_s, worker_s, images = np.sum([(0.0, 0.0, 0.0), *spans], axis=0)
        if wall_s:
            hours = f"{worker_s / 3600:.2f}"
            cells = [f"{len(group.runs)}", f"{int(images):,}", format_duration(wall_s), hours]
            yield [group.label, *cells, f"{images / wall_s:.0f}"]


def _span(member: ReportRun) -> tuple[float, float, float]:
    """Return seconds, seconds times workers, and images of the rows of metrics that have a speed."""
    config = member.run.metadata()["config"]
    there_n = member.metrics["images_per_s"] > 0
    speeds_n, steps_n, over_steps_n, workers_n = (
        member.metrics[name][there_n] for name in ("images_per_s", "step", "over_steps", "workers")
    )
    steps_n = np.where(np.isnan(over_steps_n), np.diff(steps_n, prepend=0), over_steps_n)
    workers_n = np.where(np.isnan(workers_n), int(str(config["workers"]).rpartition(":")[2]), workers_n)
    seconds_n = steps_n * config["batch_size"] / speeds_n
    return float(seconds_n.sum()), float(seconds_n @ workers_n), float(steps_n.sum()) * config["batch_size"]
