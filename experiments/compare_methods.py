"""Compare every method on the same images, with the same backbone, schedule and number of images.

Command:  python experiments/compare_methods.py --data DATA --out results/methods/cifar10 --runs RUNS
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes a run; 16 methods and 2 seeds take an hour or more. With --local: one method, one minute.
Expect:   PIRL ahead of prediction for the jigsaw, level with it or behind for the rotation; see results/methods.

Finished runs in RUNS are not repeated: the same command resumes, and more --seeds or --methods extend the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from raysl.evaluation.results import rows_of_probe
from raysl.experiment.comparison import METHODS, ComparisonFlags, measured, run_of
from raysl.experiment.script import command, locally
from raysl.ingestion import open_or_ingest, splits
from raysl.run import jsonl
from raysl.storage import Folder


@dataclass(frozen=True)
class CompareFlags(ComparisonFlags):
    """Pretrain and probe every method for each seed; see `raysl.experiment.comparison`."""

    out: str = "results/methods"
    methods: tuple[str, ...] = field(default_factory=lambda: tuple(METHODS))


def main(flags: CompareFlags) -> None:
    """Run all methods; write rows and table after every run."""
    flags = locally(flags, data="shapes:2000", methods=("predict-rotation",), images=4000)
    train, test = splits(flags.data)
    # Scored on its own training images, a classifier would only show how well it memorizes.
    names = ("knn",) if train == test else ("knn", "linear")
    seen, judged = (open_or_ingest(split).manifest.fingerprint for split in (train, test))
    rows: list[dict[str, Any]] = []
    for seed in flags.seeds:
        for method in flags.methods:
            run = run_of(flags, method, seed)
            measured([run], flags, names)
            # Other experiments may have probed more layers of these runs.
            step = run.newest().step
            found = [row for name in names for row in rows_of_probe(run, name, seen, judged, step=step)]
            about = {"method": method, "images": flags.images}
            rows += [{**row, **about} for row in found if row["layer"] == "pooled"]
            Folder(flags.out).write("rows.jsonl", jsonl(rows))
            Folder(flags.out).write("table.md", table(rows).encode())
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a line for each method: percent, the mean over seeds and each seed in brackets."""
    lines = ["| method | kNN | untrained | linear | untrained |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [
            _cell([row for row in rows if row["method"] == method], probe, encoder)
            for probe in ("knn", "linear")
            for encoder in ("trained", "random")
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(rows: list[Mapping[str, Any]] | list[dict[str, Any]], probe: str, encoder: str) -> str:
    values = [
        100 * row["value"]
        for row in rows
        if row["primary"] and row["probe"] == probe and row["encoder"] == encoder
    ]
    return f"{mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})" if values else ""


if __name__ == "__main__":
    command(main, CompareFlags)
