"""Compare invariance to the transform with linear accuracy, for a pretext task, ClusterFit and PIRL.

Command:  python experiments/invariance_vs_performance.py --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 8 minutes for each missing run, a minute or two for a probe. With --local: two to three minutes.
Expect:   the pretext task below ClusterFit and PIRL in invariance and in linear top-1. See results/lectures.

ClusterFit (Yan et al. 2020) clusters the features of the first method. The picture is scatter.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raysl.evaluation.results import rows_of_probe
from raysl.experiment.comparison import ComparisonFlags, measured, reported, small, trained
from raysl.experiment.script import command
from raysl.ingestion import open_or_ingest, splits
from raysl.probes.invariance import Config as Invariance
from raysl.reporting.report_runs import LabeledRow, groups
from raysl.reporting.run_figures import colors
from raysl.reporting.tables import estimates
from raysl.run import Run
from raysl.storage import Folder


@dataclass(frozen=True)
class ScatterFlags(ComparisonFlags):
    """Pretrain missing runs, measure invariance and accuracy, and draw a scatter plot.

    Args:
        invariance: protocol of the measure. PIRL learns from a jigsaw of 2 x 2 patches, predict-jigsaw of 3 x 3.
    """

    out: str = "results/invariance_vs_performance"
    methods: tuple[str, ...] = ("predict-jigsaw", "clusterfit", "pirl-jigsaw")
    invariance: Invariance = field(default_factory=Invariance)


def main(flags: ScatterFlags) -> None:
    """Print the tables, and write the report and the scatter plot."""
    flags = replace(small(flags), teacher=flags.methods[0])
    names = ["linear", "invariance"]
    runs = trained(flags, names)
    measured(runs, flags, names, configs={"invariance": flags.invariance})
    reported(runs, flags, names)
    train, test = (open_or_ingest(split).manifest.fingerprint for split in splits(flags.data))
    Folder(flags.out).write("scatter.png", scatter(runs, train, test, flags.invariance))


def scatter(runs: Sequence[Run], train: str, test: str, invariance: Invariance) -> bytes:
    """Return a PNG of linear top-1 against the invariance of pooled features: a large dot for a method, small ones for
    its seeds.

    Args:
        train: fingerprint of the train set of the linear probe.
        test: fingerprint of the test set of both probes.
        invariance: protocol of the invariance.
    """
    from raysl.reporting.figure import plot_png

    rows = []
    for group in groups([str(run.folder) for run in runs]):
        for member in group.runs:
            for name, config in (("linear", None), ("invariance", invariance)):
                kept = rows_of_probe(member.run, name, train, test, config, step=member.run.newest().step)
                names = {"trained": group.label, "random": "untrained"}  # pixels have no invariance
                rows += [
                    LabeledRow(names[row["encoder"]], row)
                    for row in kept
                    if row["primary"] and row["encoder"] in names
                ]
    cells = estimates(rows)
    labels = [
        label
        for label in dict.fromkeys(item.label for item in rows)
        if {(label, "pooled", "closer"), (label, "pooled", "top1")} <= cells.keys()
    ]
    colored = colors(labels)

    def draw(axes: Any) -> None:
        for label in labels:
            x, y = cells[label, "pooled", "closer"], cells[label, "pooled", "top1"]
            axes.plot(x.values, y.values, ".", color=colored[label], alpha=0.4)
            axes.plot(x.mean, y.mean, "o", color=colored[label], label=label)
        axes.set_xlabel("invariance: a transformed image is closer than another one")
        axes.set_ylabel("linear top-1")
        axes.legend(fontsize=8)

    return plot_png(draw)


if __name__ == "__main__":
    command(main, ScatterFlags)
