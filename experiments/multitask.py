"""Compare two tasks together with each of them alone: relative position and colorization.

Command:  python experiments/multitask.py --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes for each missing run, a minute or two for a probe. With --local: two to three minutes.
Expect:   both together about as good as the better task alone; in the paper they are better. See results/lectures.

Doersch and Zisserman 2017, "Multi-task self-supervised visual learning", table 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from raysl.experiment.comparison import ComparisonFlags, measured, reported, small, trained
from raysl.experiment.script import command
from raysl.probes.linear import Config as Linear


@dataclass(frozen=True)
class TaskFlags(ComparisonFlags):
    """Pretrain missing runs and probe every layer; with `local`, the last one.

    Args:
        linear: protocol of the linear probe.
    """

    out: str = "results/multitask"
    methods: tuple[str, ...] = (
        "predict-relative_position",
        "predict-colorization",
        "multitask-relative_position,colorization",
    )
    # The schedule "optimum" takes many minutes for a layer of 9,216 numbers on two cores.
    linear: Linear = field(default_factory=lambda: Linear(schedule="fast"))


def main(flags: TaskFlags) -> None:
    """Print the tables and write the report."""
    flags = small(flags)
    runs = trained(flags, ["knn", "linear"])
    layers = ["pooled"] if flags.local else ["all"]
    measured(runs, flags, ["knn", "linear"], layers=layers, configs={"linear": flags.linear})
    reported(runs, flags, ["knn", "linear"])


if __name__ == "__main__":
    command(main, TaskFlags)
