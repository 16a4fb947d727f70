"""Measure how far features move when an image is transformed: PIRL against Jigsaw.

Command:  python experiments/invariance.py --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes for each missing run, a minute or two for a probe. With --local: two to three minutes.
Expect:   at the last layer, PIRL is more invariant to a jigsaw than the untrained backbone, and predict-jigsaw less, if
          each image is seen at least ten times.

PIRL (Misra and van der Maaten 2020), figure 5. See the figures invariance and invariance-map of the report.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from raysl.experiment.comparison import ComparisonFlags, measured, reported, small, trained
from raysl.experiment.script import command
from raysl.probes.invariance import Config as Invariance


@dataclass(frozen=True)
class InvarianceFlags(ComparisonFlags):
    """Pretrain missing runs, measure invariance, and draw histograms and a map of transforms and layers.

    Args:
        invariance: protocol of the measure. PIRL learns from a jigsaw of 2 x 2 patches, predict-jigsaw of 3 x 3.
    """

    out: str = "results/invariance"
    methods: tuple[str, ...] = ("predict-jigsaw", "pirl-jigsaw")
    invariance: Invariance = field(default_factory=Invariance)


def main(flags: InvarianceFlags) -> None:
    """Print the table and write the report."""
    flags = small(flags)
    runs = trained(flags, ["invariance"])
    measured(runs, flags, ["invariance"], layers=["all"], configs={"invariance": flags.invariance})
    reported(runs, flags, ["invariance"])


if __name__ == "__main__":
    command(main, InvarianceFlags)
