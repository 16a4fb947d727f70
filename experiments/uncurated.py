"""Pretrain on any images and probe on a labeled set: test how much uncurated images help.

Command:  python experiments/uncurated.py --source IMAGES --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes for each missing run, a minute or two for a probe. With --local: two to three minutes.
Expect:   PIRL loses less than prediction from other images only if it sees them for more epochs. See
          results/lectures.

PIRL (Misra and van der Maaten 2020), table 4, pretrains on YFCC; here `--source` is any images, without labels.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysl.experiment.comparison import ComparisonFlags, measured, reported, run_of, small, trained
from raysl.experiment.script import command
from raysl.ingestion import splits
from raysl.storage import Folder


@dataclass(frozen=True)
class SourceFlags(ComparisonFlags):
    """Pretrain on the source and on the labeled data, and probe both on the labeled data.

    Args:
        source: images to learn from; labels are not used.
    """

    out: str = "results/uncurated"
    methods: tuple[str, ...] = ("predict-jigsaw", "pirl-jigsaw")
    source: str = "shapes:20000"


def main(flags: SourceFlags) -> None:
    """Print the tables, with the fingerprint of the images of each method, and write the report."""
    flags = small(flags)
    train, _ = splits("shapes:6000" if flags.local and flags.source == SourceFlags().source else flags.source)
    elsewhere = Folder(flags.runs) / "uncurated"
    names = ["knn", "linear"]
    runs = trained(flags, names)
    runs += [
        run_of(flags, method, seed, train, elsewhere) for method in flags.methods for seed in flags.seeds
    ]
    measured(runs, flags, names)
    reported(runs, flags, names)


if __name__ == "__main__":
    command(main, SourceFlags)
