"""The results of a sweep as rows, and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import TYPE_CHECKING, Any

from raysl.tuning.standing import Climb, Standing

if TYPE_CHECKING:
    from rich.table import Table


def rows(standing: Standing) -> list[dict[str, Any]]:
    """A row for each trial: those that came farthest first, and among them the best.

    Keys: "trial", "values" (its point), "state", "share" (of the schedule that it was scored at), "score" (the mean
    over seeds), "spread" (their standard deviation; None for one seed), "seeds" (score by seed) and "reason".
    """
    made = []
    for trial in range(standing.num_trials):
        state = standing.state(trial)
        scores = standing.scores_of(trial)
        rung = len(scores) - 1
        by_seed = (
            {str(s): standing.scores[Climb(trial, s, rung)] for s in standing.config.seeds} if scores else {}
        )
        made.append(
            {
                "trial": trial,
                "values": standing.values(trial, max(rung, 0)),
                "state": state,
                "share": standing.config.shares()[rung] if scores else 0.0,
                "score": scores[-1] if scores else None,
                "spread": stdev(by_seed.values()) if len(by_seed) > 1 else None,
                "seeds": by_seed,
                "reason": standing.failures.get(trial, ""),
            }
        )
    return sorted(
        made, key=lambda row: (row["state"] == "failed", -row["share"], -(row["score"] or 0.0), row["trial"])
    )


def described(values: Mapping[str, Any]) -> str:
    """A point in one line."""
    return ", ".join(f"{name}={shown(value)}" for name, value in values.items())


def shown(value: Any) -> str:
    """A value as short as it can be typed."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if value is None else str(value)


def _short(value: Any) -> str:
    """For a table: the exact value stands in the rows."""
    return f"{value:.3g}" if isinstance(value, float) else shown(value)


def render(rows: Sequence[Mapping[str, Any]], probe: str, epochs: float) -> Table:
    """The rows as a table: one line a trial, and why some have failed."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = list(next((row["values"] for row in rows if row["values"]), {}))
    why = "\n".join(f"Trial {row['trial']}: {row['reason']}" for row in rows if row["reason"])
    title = f"{len(rows)} trials by {probe}"
    about = Text(why)
    made = Table(title=title, box=box.SIMPLE, caption=about, caption_justify="left", padding=0)
    made.add_column("trial", justify="right")
    shorts = [name.rpartition(".")[2] for name in names]
    for name, short in zip(names, shorts, strict=True):
        title = name if shorts.count(short) > 1 else short
        made.add_column(title.replace("_", "\n"), justify="right", overflow="fold")
    for name in (probe, "±", "epoch"):
        made.add_column(name, justify="right")
    made.add_column("", no_wrap=True)
    for row in rows:
        values = [_short(row["values"][name]) if row["values"] else "" for name in names]
        score = "" if row["score"] is None else f"{row['score']:.4f}"
        spread = "" if row["spread"] is None else f"{row['spread']:.4f}"
        epoch = f"{epochs * row['share']:.3g}"
        made.add_row(str(row["trial"]), *values, score, spread, epoch, row["state"])
    return made
