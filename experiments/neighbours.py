"""The nearest images of the same few, for networks that learned in different ways, side by side.

Command:  python experiments/neighbours.py --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes a run that is not there yet, a minute or two a probe. With --local: two to three minutes.
Expect:   neighbours by colour in an untrained network, by layout with prediction, more by class with PIRL and labels.

The picture is neighbours.png; each run keeps its own sheet for `raysl report`, named by step and data sets.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysl import extraction
from raysl.documentation import pictures
from raysl.experiment.comparison import LineupFlags, measured, reported, small, trained
from raysl.experiment.script import command
from raysl.extraction import Encoder
from raysl.ingestion import resolve, splits
from raysl.reporting import retrieval_grid
from raysl.storage import Folder


@dataclass(frozen=True)
class NeighbourFlags(LineupFlags):
    """Pretrains what is missing, scores retrieval, and draws the sheets of the first seed.

    Args:
        count: images that ask.
        k: nearest images of each.
    """

    out: str = "results/neighbours"
    methods: tuple[str, ...] = ("predict-jigsaw", "pirl-jigsaw", "supervised")
    count: int = 6
    k: int = 4


def main(flags: NeighbourFlags) -> None:
    """Prints the table of retrieval, and writes the report and the picture."""
    flags = small(flags)
    runs = trained(flags, ["retrieval"])
    measured(runs, flags, ["retrieval"])
    train, test = (resolve(split) for split in splits(flags.data))
    first = runs[:: len(flags.seeds)]
    last = [extraction.Trained(run, run.newest()) for run in first]
    encoders: list[Encoder] = [extraction.untrained(first[0]), *last]
    size, cache = flags.image_size, Folder(flags.runs) / "features"
    sheets = retrieval_grid.sheets(encoders, train, test, size, cache, flags.count, flags.k)
    for source, sheet in zip(last, sheets[1:], strict=True):
        retrieval_grid.keep(sheet, source.run.folder, source, train, test)
    named = dict(zip(["untrained", *flags.methods], sheets, strict=True))
    Folder(flags.out).write("neighbours.png", pictures.png(retrieval_grid.beside(named)))
    reported(runs, flags, ["retrieval"])


if __name__ == "__main__":
    command(main, NeighbourFlags)
