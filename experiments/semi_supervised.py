"""Train the whole network on 1 % and 10 % of the labels, from pretrained and from untrained weights.

Command:  python experiments/semi_supervised.py --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes for each missing run, several for a probe. With --local: two to three minutes.
Expect:   PIRL ahead of prediction at 1 % of the labels, and ahead of untrained weights only where each image is seen
          at least ten times; the paper finds the largest gain at 1 %. See results/lectures.

PIRL (Misra and van der Maaten 2020), table 3; the probe `semisup`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from raysl.experiment.comparison import ComparisonFlags, measured, reported, small, trained
from raysl.experiment.script import command
from raysl.probes.semisup import Config as Semisup


@dataclass(frozen=True)
class LabelFlags(ComparisonFlags):
    """Pretrain missing runs and fine-tune each backbone on a few labels.

    Args:
        semisup: protocol of the probe.
    """

    out: str = "results/semi_supervised"
    # The published schedule is for ImageNet, where 1 % gives 50 steps an epoch.
    semisup: Semisup = field(default_factory=lambda: Semisup(epochs=20, batch_size=32, head_lr=10.0))
    methods: tuple[str, ...] = ("predict-jigsaw", "pirl-jigsaw", "supervised")


def main(flags: LabelFlags) -> None:
    """Print the table and write the report."""
    flags = small(flags)
    runs = trained(flags, ["semisup"])
    config = replace(flags.semisup, epochs=2) if flags.local else flags.semisup
    measured(runs, flags, ["semisup"], configs={"semisup": config})
    # The paper compares top-5.
    besides = {f"top{k}@{100 * share:g}%" for k in (1, 5) for share in config.shares}
    reported(runs, flags, ["semisup"], besides)


if __name__ == "__main__":
    command(main, LabelFlags)
