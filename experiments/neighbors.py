"""Draw the nearest neighbors of the same images in the features of several methods.

Command:  python experiments/neighbors.py --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes for each missing run, a minute or two for a probe. With --local: two to three minutes.
Expect:   neighbors by color for an untrained network, by layout for prediction, by class for PIRL and supervised.

The picture is neighbors.png; each run stores its own grid for `raysl report`, named by step and data sets.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysl import extraction
from raysl.experiment.comparison import ComparisonFlags, measured, reported, small, trained
from raysl.experiment.script import command
from raysl.extraction import Encoder
from raysl.ingestion import open_or_ingest, splits
from raysl.reporting import pictures, retrieval_grid
from raysl.storage import Folder


@dataclass(frozen=True)
class NeighborFlags(ComparisonFlags):
    """Pretrain missing runs, score retrieval, and draw the grids of the first seed.

    Args:
        count: number of query images.
        k: number of neighbors of each.
    """

    out: str = "results/neighbors"
    methods: tuple[str, ...] = ("predict-jigsaw", "pirl-jigsaw", "supervised")
    count: int = 6
    k: int = 4


def main(flags: NeighborFlags) -> None:
    """Print the table of retrieval, and write the report and the picture."""
    flags = small(flags)
    runs = trained(flags, ["retrieval"])
    measured(runs, flags, ["retrieval"])
    train, test = (open_or_ingest(split) for split in splits(flags.data))
    first = runs[:: len(flags.seeds)]
    last = [extraction.Trained(run, run.newest()) for run in first]
    encoders: list[Encoder] = [extraction.untrained(first[0]), *last]
    size, cache = flags.image_size, Folder(flags.runs) / "features"
    grids = retrieval_grid.grids(encoders, train, test, size, cache, flags.count, flags.k)
    for source, grid in zip(last, grids[1:], strict=True):
        retrieval_grid.save(grid, source.run.folder, source, train, test)
    named = dict(zip(["untrained", *flags.methods], grids, strict=True))
    Folder(flags.out).write("neighbors.png", pictures.png(retrieval_grid.side_by_side(named)))
    reported(runs, flags, ["retrieval"])


if __name__ == "__main__":
    command(main, NeighborFlags)
