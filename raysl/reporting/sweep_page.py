"""Write the page of a sweep: figures, a table, costs, and the best configuration as a command to paste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from raysl.config.command import command, wrapped
from raysl.errors import counted
from raysl.reporting.figure import Figure
from raysl.reporting.page import ReportConfig, render
from raysl.reporting.sweep_figures import figures
from raysl.tuning.results import SweepResults, described, doubts, format_sweep_value, number

_BODY = """<p>{{ summary }}</p>
{% if command %}<h2>Best</h2><p>{{ best }}</p><pre>{{ command }}</pre><p>{{ caution }}</p>{% endif %}
<h2>Trials</h2>
<div class="wide"><table><tr><th>trial</th>{% for name in names %}<th>{{ name | breakable }}</th>{% endfor %}
<th>{{ probe }}</th><th>±</th><th>epoch</th><th></th></tr>
{% for row in rows %}<tr>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}
<td class="why">{{ row.why }}</td></tr>
{% endfor %}</table></div>
<div class="figures">{{ pictures(figures) }}</div>
<h2>Cost</h2><p>{{ cost }}</p>
"""


def page(folder: str, config: ReportConfig) -> tuple[str, list[Figure]]:
    """Return the page of the sweep in a folder, and its figures. Raises UserError if it is missing or damaged."""
    results = SweepResults.open(folder)
    drawn = list(figures(results))
    rows, names, sweep = results.rows(), results.space.names, results.config
    states = [row["state"] for row in rows]
    best, epochs = results.best_config(), results.base.epochs
    best_row = next((row for row in rows if row["trial"] == results.best()), None)
    text = render(
        _BODY,
        title=", ".join(names) if "method" in names else f"{results.base.method}: {', '.join(names)}",
        summary=(
            f"{counted(len(rows), 'trial')}, each with {counted(len(sweep.seeds), 'seed')} "
            f"({', '.join(map(str, sweep.seeds))}) and {epochs:g} "
            f"epoch{'' if epochs == 1 else 's'}, compared by {sweep.probe} on "
            f"{results.validation_uri.rpartition('/')[2]}; "
            f"searcher {sweep.searcher}, scheduler {sweep.scheduler}. Finished {states.count('finished')}, "
            f"stopped {states.count('stopped')}, failed {states.count('failed')}."
            + "".join(
                f" All trials of {method} have {described(values)}."
                for method, values in results.journal.method_values.items()
                if values
            )
        ),
        best=best_row and f"Trial {best_row['trial']}: {described(best_row['values'])}, {_score(best_row)}.",
        command=best and wrapped(command(replace(best, data="DATA", run="RUN"))),
        caution=_caution(results),
        names=names,
        probe=sweep.probe,
        rows=[
            *(_row(row, names, results.base.epochs) for row in rows),
            *(
                {"cells": [*[""] * (1 + len(names)), *map(number, scores), ""], "why": label}
                for label, scores in results.extra_rows("test images: ")
            ),
        ],
        figures=drawn,
        cost=_cost(results, config),
    )
    return text, drawn


def _caution(results: SweepResults) -> str:
    """Return the score of the best trial on the test images, and sentences that say how far its lead can be trusted."""
    sentences = []
    if tested := results.extras("test").get("trained"):
        score = f"{mean(tested):.4f}"
        sentences.append(f"On the test images, on which no other was scored, the best trial has {score}.")
    if len(results.trials) > 1:
        sentences.append(
            "Its score on the validation images is too high by chance, because it was chosen by that score."
        )
    if found := results.expected_lead_by_chance():
        count, deviation, gap = found
        sentences.append(
            f"If all {count} finished trials were equal, the best would still be {gap:.4f} above their mean, because "
            f"seeds differ by ± {deviation:.4f}; a smaller lead shows nothing."
        )
    sentences += doubts(results)
    if results.chosen_on_test:
        sentences.append(
            "The trials were chosen on the test split of the source: no score here is that of unseen images."
        )
    return " ".join(sentences)


def _score(row: dict[str, Any]) -> str:
    spread = "" if row["spread"] is None else f" ± {row['spread']:.4f}"
    return f"{row['score']:.4f}{spread}"


def _row(row: dict[str, Any], names: Sequence[str], epochs: float) -> dict[str, Any]:
    cells = [str(row["trial"]), *(format_sweep_value(row["values"][name]) for name in names)]
    cells += [number(row["score"]), number(row["spread"]), f"{epochs * row['share']:.3g}"]
    return {"cells": cells, "why": row["reason"] or row["state"]}


def _cost(results: SweepResults, config: ReportConfig) -> str:
    """Return the core-hours and GPU-hours that the runs held, without those of sessions that were killed."""
    rows = results.journal.of("score")
    cores = sum(row["seconds"] * row["cpus"] for row in rows) / 3600
    gpus = sum(row["seconds"] * row["gpus"] for row in rows) / 3600
    hours = sum(row["seconds"] for row in rows) / 3600
    text = f"{hours:.2f} hours of runs, one after the other: {cores:.2f} core-hours and {gpus:.2f} GPU-hours"
    if config.core_hour or config.gpu_hour:
        text += f", which cost {cores * config.core_hour + gpus * config.gpu_hour:.2f}"
    return f"{text}. What was lost when a session was killed is not counted."
