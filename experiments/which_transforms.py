"""Leave one transform of the views out at a time: which of them does the method need?

Command:  python experiments/which_transforms.py --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes for each missing run, a minute for a probe. With --local: two to three minutes.
Expect:   without crops kNN falls below the untrained network; without color jitter it does not fall, unlike in SimCLR,
          figure 5. See results/lectures.

An open question of the lectures. The methods see the same images; "crops" leaves out the random crop, and the others
are parts of the augmentation recipe, as in `--view.recipe simclr-gray`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from raysl.config import Pretraining
from raysl.experiment.comparison import ComparisonFlags, measured, reported, settings, small
from raysl.experiment.script import command, pretrained
from raysl.ingestion import splits
from raysl.run import Run
from raysl.storage import Folder

_CROPS = "crops"


@dataclass(frozen=True)
class TransformFlags(ComparisonFlags):
    """Pretrain each method with all transforms and without each, and probe the runs.

    Args:
        recipe: the augmentation with all of its parts.
        without: transforms that are left out, one at a time.
    """

    out: str = "results/which_transforms"
    runs: str = "runs/which_transforms"
    methods: tuple[str, ...] = ("simclr",)
    recipe: str = "simclr"
    without: tuple[str, ...] = (_CROPS, "hflip", "jitter", "gray", "blur")


def main(flags: TransformFlags) -> None:
    """Print the table and write the report."""
    flags = small(flags)
    if flags.local:
        flags = replace(flags, without=flags.without[:2])
    runs = [
        run_of(flags, method, left_out, seed)
        for method in flags.methods
        for left_out in ("", *flags.without)
        for seed in flags.seeds
    ]
    measured(runs, flags, ["knn", "linear"])
    reported(runs, flags, ["knn", "linear"])


def run_of(flags: TransformFlags, method: str, left_out: str, seed: int) -> Run:
    """Train a method without one of the transforms."""
    place = Folder(flags.runs) / (f"without-{left_out}" if left_out else "all")
    config: Pretraining = settings(flags, method, seed, splits(flags.data)[0], place)
    recipe = flags.recipe if left_out in ("", _CROPS) else f"{flags.recipe}-{left_out}"
    scale = 1.0 if left_out == _CROPS else config.view.min_scale
    return pretrained(replace(config, view=replace(config.view, recipe=recipe, min_scale=scale)), flags)


if __name__ == "__main__":
    command(main, TransformFlags)
