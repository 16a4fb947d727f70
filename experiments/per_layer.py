"""Compare methods by a linear probe of every layer.

Command:  python experiments/per_layer.py --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes for each missing run, a minute or two for a probe. With --local: two to three minutes.
Expect:   compared with the untrained backbone, predict-jigsaw gains at res2 and nothing at the last layer; PIRL gains
          most at the last.

PIRL (Misra and van der Maaten 2020), figure 6. See the figure layers-linear of the report.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from raysl.experiment.comparison import ComparisonFlags, measured, reported, small, trained
from raysl.experiment.script import command
from raysl.probes.linear import Config as Linear


@dataclass(frozen=True)
class LayerFlags(ComparisonFlags):
    """Pretrain missing runs, probe every layer, and draw the curves.

    Args:
        linear: protocol of the probe.
    """

    out: str = "results/per_layer"
    methods: tuple[str, ...] = ("predict-jigsaw", "pirl-jigsaw", "predict-rotation", "supervised")
    # The schedule "optimum" takes many minutes for a layer of 9,216 numbers on two cores.
    linear: Linear = field(default_factory=lambda: Linear(schedule="fast"))


def main(flags: LayerFlags) -> None:
    """Print the table by layer and write the report."""
    flags = small(flags)
    if flags.local:
        flags = replace(flags, methods=flags.methods[:2])
    runs = trained(flags, ["linear"])
    measured(runs, flags, ["linear"], layers=["all"], configs={"linear": flags.linear})
    reported(runs, flags, ["linear"])


if __name__ == "__main__":
    command(main, LayerFlags)
