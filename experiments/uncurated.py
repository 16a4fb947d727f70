"""Pretraining on one set and probing on another: what images are worth that nobody chose for the task.

Command:  python experiments/uncurated.py --source IMAGES --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes a run that is not there yet, a minute or two a probe. With --local: two to three minutes.
Expect:   of both sources, the set itself and another one, PIRL loses less than prediction.

PIRL (Misra and van der Maaten 2020), table 4, pretrains on YFCC; here `--source` is any images, without labels.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysl.experiment.comparison import LineupFlags, measured, reported, run_of, small, trained
from raysl.experiment.script import command
from raysl.ingestion import splits
from raysl.storage import Folder


@dataclass(frozen=True)
class SourceFlags(LineupFlags):
    """Pretrains on the source and on the labelled data themselves, and probes both on the latter.

    Args:
        source: images to learn from; labels are not looked at.
    """

    out: str = "results/uncurated"
    methods: tuple[str, ...] = ("predict-jigsaw", "pirl-jigsaw")
    source: str = "shapes:20000"


def main(flags: SourceFlags) -> None:
    """Prints the tables, with the fingerprint of the images behind each method, and writes the report."""
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
