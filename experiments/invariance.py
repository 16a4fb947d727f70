"""How far features move when an image is transformed: PIRL against Jigsaw.

Command:  python experiments/invariance.py --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes a run that is not there yet, a minute or two a probe. With --local: two to three minutes.
Expect:   at the last layer PIRL is more invariant to a jigsaw than the untrained backbone and predict-jigsaw less, where
          each image is seen ten times and more.

PIRL (Misra and van der Maaten 2020), figure 5. The figures invariance and invariance-map of the report.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysl.experiment.comparison import LineupFlags, measured, reported, small, trained
from raysl.experiment.script import command


@dataclass(frozen=True)
class InvarianceFlags(LineupFlags):
    """Pretrains what is missing, measures invariance, and draws histograms and the map of transforms and layers."""

    out: str = "results/invariance"
    methods: tuple[str, ...] = ("predict-jigsaw", "pirl-jigsaw")


def main(flags: InvarianceFlags) -> None:
    """Prints the table and writes the report."""
    flags = small(flags)
    runs = trained(flags, ["invariance"])
    measured(runs, flags, ["invariance"], layers=["all"])
    reported(runs, flags, ["invariance"])


if __name__ == "__main__":
    command(main, InvarianceFlags)
