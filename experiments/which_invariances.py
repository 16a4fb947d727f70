"""Which invariances go with which tasks? Rank correlation of invariance and task over methods and seeds.

Command:  python experiments/which_invariances.py --data clips:2000 --images 24000 --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 8 minutes for each missing run, two minutes for its probes. With --local: a few minutes.
Expect:   invariance to rotation and order goes with classes, and against key points and normals, if anything.

An open question of the lectures. The map map.png has a row for each transform of the probe `invariance` and a column
for each task; a cell is Spearman's correlation over all runs and untrained networks. With so few networks only large
ones differ from chance: the picture says from which size on (5 %, one cell at a time).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysl.evaluation.results import rows_of
from raysl.experiment.comparison import ComparisonFlags, measured, reported, small, trained
from raysl.experiment.script import command
from raysl.probes.linear import Config as Linear
from raysl.run import Run
from raysl.storage import Folder

# The number of each task that is compared; more is better.
TASKS = {"knn": "top1/k=20,T=0.07", "linear": "top1", "keypoints": "PCK@0.1", "normals": "within/11.25"}


@dataclass(frozen=True)
class MapFlags(ComparisonFlags):
    """Pretrain missing runs, measure invariance and the tasks, and draw the map. Views have at least 64 pixels."""

    data: str = "clips:2000"
    out: str = "results/which_invariances"
    runs: str = "runs/clips"
    methods: tuple[str, ...] = (
        *("predict-rotation", "predict-jigsaw", "predict-frame_order", "pirl-rotation", "pirl-jigsaw"),
        *("simclr", "supervised"),
    )


def main(flags: MapFlags) -> None:
    """Print the tables, and write the report and the map."""
    flags = small(flags, "clips:300")
    flags = replace(flags, image_size=max(flags.image_size, 64))
    if flags.local:
        flags = replace(flags, methods=flags.methods[:2])
    names = ["invariance", *TASKS]
    runs = trained(flags, names)
    measured(runs, flags, names, configs={"linear": Linear(schedule="fast")})
    reported(runs, flags, names)
    Folder(flags.out).write("map.png", drawn(*correlations(runs)))


def correlations(runs: Sequence[Run]) -> tuple[list[str], NDArray[np.float64], int]:
    """Return the transforms, Spearman's correlations (transforms, tasks), and the number of networks."""
    from scipy.stats import spearmanr

    networks: dict[tuple[str, int], dict[str, float]] = {}
    for run in runs:
        newest = run.newest().step
        for row in rows_of(run):
            if row["layer"] == "pooled" and row["step"] in (0, newest) and row["encoder"] != "pixels":
                key = (str(run.folder) if row["encoder"] == "trained" else "untrained", row["seed"])
                networks.setdefault(key, {})[_name(row)] = row["value"]
    found = list(networks.values())
    transforms = sorted({name for one in found for name in one if name.startswith("closer/")})
    matrix = np.full((len(transforms), len(TASKS)), np.nan)
    for r, transform in enumerate(transforms):
        for c, task in enumerate(TASKS):
            pairs = [(one[transform], one[task]) for one in found if {transform, task} <= one.keys()]
            if len(pairs) > 2:
                matrix[r, c] = spearmanr(*zip(*pairs, strict=True)).statistic
    return [name.removeprefix("closer/") for name in transforms], matrix, len(found)


def _name(row: Mapping[str, Any]) -> str:
    """Return the task of a row that is compared, or its own name."""
    return str(row["probe"] if TASKS.get(row["probe"]) == row["name"] else row["name"])


def drawn(transforms: Sequence[str], matrix: NDArray[np.float64], networks: int) -> bytes:
    """Return the map as PNG."""
    from scipy.stats import t

    from raysl.reporting.figure import plot_png as figure

    freedom = max(1, networks - 2)
    bound = t.ppf(0.975, freedom) / np.sqrt(freedom + t.ppf(0.975, freedom) ** 2)

    def draw(axes: Any) -> None:
        axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
        axes.set_xticks(range(len(TASKS)), list(TASKS))
        axes.set_yticks(range(len(transforms)), transforms)
        for (r, c), value in np.ndenumerate(matrix):
            axes.text(c, r, f"{value:.2f}", ha="center", va="center")
        axes.set_title(f"Spearman over {networks} networks; chance stays within ±{bound:.2f}", fontsize=9)
        axes.set_ylabel("invariance to")

    return figure(draw)


if __name__ == "__main__":
    command(main, MapFlags)
