"""Is a representation that ignores the transform a better one? Pretext, clustering and PIRL in both.

Command:  python experiments/invariance_vs_performance.py --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 8 minutes a run that is not there yet, a minute or two a probe. With --local: two to three minutes.
Expect:   pretext < clustering < PIRL in invariance and in linear top-1.

Clustering is ClusterFit (Yan et al. 2020) of the first method's runs. The picture is scatter.png.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from raysl.dataset import DataSet
from raysl.experiment import command
from raysl.ingest import resolve, splits
from raysl.lineup import LineupFlags, measured, reported, small, trained
from raysl.probe import rows_under
from raysl.report.entries import Found, groups
from raysl.report.run_figures import colours
from raysl.report.tables import estimates
from raysl.run import Run
from raysl.storage import Folder


@dataclass(frozen=True)
class ScatterFlags(LineupFlags):
    """Pretrains what is missing, measures invariance and worth, and draws one against the other."""

    out: str = "results/invariance_vs_performance"
    methods: tuple[str, ...] = ("predict-jigsaw", "clusterfit", "pirl-jigsaw")


def main(flags: ScatterFlags) -> None:
    """Prints the tables, and writes the report and the scatter plot."""
    flags = replace(small(flags), teacher=flags.methods[0])
    names = ["linear", "invariance"]
    runs = trained(flags, names)
    measured(runs, flags, names)
    reported(runs, flags, names)
    Folder(flags.out).write("scatter.png", scatter(runs, resolve(splits(flags.data)[1])))


def scatter(runs: list[Run], test: DataSet) -> bytes:
    """PNG of linear top-1 against the invariance of the pooled features, by the default protocols on one test set: a
    dot a run's method, small ones its seeds."""
    from raysl.report.picture import drawn

    rows = []
    for group in groups([str(run.folder) for run in runs]):
        for entry in group.entries:
            for name in ("linear", "invariance"):
                kept = rows_under(entry.run, name, test.manifest.fingerprint, step=entry.run.newest().step)
                shown = [row for row in kept if row["headline"]]
                rows += [
                    Found(group.label if row["encoder"] == "trained" else "untrained", row) for row in shown
                ]
    cells = estimates(rows)
    labels = [label for label, layer, name in cells if (layer, name) == ("pooled", "closer")]
    coloured = colours(labels)

    def draw(axes: Any) -> None:
        for label in labels:
            x, y = cells[label, "pooled", "closer"], cells[label, "pooled", "top1"]
            axes.plot(x.values, y.values, ".", color=coloured[label], alpha=0.4)
            axes.plot(x.mean, y.mean, "o", color=coloured[label], label=label)
        axes.set_xlabel("invariance: a transformed image is closer than another one")
        axes.set_ylabel("linear top-1")
        axes.legend(fontsize=8)

    return drawn(draw)


if __name__ == "__main__":
    command(main, ScatterFlags)
