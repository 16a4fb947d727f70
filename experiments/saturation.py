"""Does more data, or a wider network, still help? Every width on every number of images, for as many steps.

Command:  python experiments/saturation.py --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 10 minutes for each missing run, a minute for a probe. With --local: two to three minutes.
Expect:   fewer images, each seen more often, give better features, and width makes little difference; Goyal et al.
          2019, figure 2, find that a pretext task gains from width. See results/lectures.

An open question of the lectures. All runs see `--images` images; with fewer different ones they see these more often.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from raysl import plugins
from raysl.backbone.network import BackboneConfig
from raysl.backbone.small import SmallBackbone
from raysl.experiment.comparison import ComparisonFlags, measured, reported, settings, small, with_negatives
from raysl.experiment.script import command, drawn, pretrained
from raysl.run import Run
from raysl.storage import Folder


def narrow() -> nn.Module:
    """Return the small backbone with half of its channels."""
    return SmallBackbone(nn.BatchNorm2d, 96)


def usual() -> nn.Module:
    """Return the small backbone."""
    return SmallBackbone(nn.BatchNorm2d)


def wide() -> nn.Module:
    """Return the small backbone with twice its channels."""
    return SmallBackbone(nn.BatchNorm2d, 384)


@dataclass(frozen=True)
class SaturationFlags(ComparisonFlags):
    """Pretrain every width on every number of images, and probe the runs on all images.

    Args:
        widths: names of functions of this file that build a backbone.
        sizes: numbers of different images.
    """

    out: str = "results/saturation"
    runs: str = "runs/saturation"
    methods: tuple[str, ...] = ("predict-jigsaw", "pirl-jigsaw")
    widths: tuple[str, ...] = ("narrow", "usual", "wide")
    sizes: tuple[int, ...] = (2000, 10_000, 50_000)


def main(flags: SaturationFlags) -> None:
    """Print the table and write the report."""
    flags = small(flags)
    if flags.local:
        flags = replace(flags, methods=flags.methods[:1], widths=flags.widths[:2], sizes=(1000,))
    runs = [
        run_of(flags, method, width, size, seed)
        for method in flags.methods
        for width in flags.widths
        for size in flags.sizes
        for seed in flags.seeds
    ]
    measured(runs, flags, ["knn", "linear"])
    reported(runs, flags, ["knn", "linear"])


def run_of(flags: SaturationFlags, method: str, width: str, size: int, seed: int) -> Run:
    """Train a method with one width on a number of images."""
    images = drawn(flags, size)
    place = Folder(flags.runs) / f"{width}-{size}"
    config = settings(flags, method, seed, str(images.folder), place)
    # As many negatives for every number of images as the smallest allows.
    parts = with_negatives(config.parts, min(flags.sizes) - 1)
    backbone = BackboneConfig(f"{Path(__file__).absolute()}:{width}")
    return pretrained(replace(config, parts=parts, backbone=backbone), flags)


if __name__ == "__main__":
    # Before Ray starts: its processes build the backbones of this file too.
    plugins.trust(plugins.remembered(__file__))
    command(main, SaturationFlags)
