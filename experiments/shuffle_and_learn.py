"""Learn from the order of frames, and read key points out of the features: Shuffle and Learn in small.

Command:  python experiments/shuffle_and_learn.py --data clips:2000 --images 24000 --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 8 minutes for each missing run, a minute for a probe. With --local: a few minutes.
Expect:   key points from frame order better than from an untrained network; actions need not be.

Shuffle and Learn (Misra, Zitnick and Hebert 2016, arXiv 1603.08561) transfers frame order to poses of people (FLIC and
MPII) and to actions; the lecture's figure 10. Here the network is frozen and the figures are drawn: the probes
`keypoints`, `video`, and `patches` of frames, on every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from raysl.experiment.comparison import ComparisonFlags, measured, reported, small, trained
from raysl.experiment.script import command
from raysl.probes.keypoints import Config as Keypoints
from raysl.probes.linear import Config as Linear
from raysl.probes.patches import Config as Patches
from raysl.probes.video import Config as Video

# The side of the drawn clips.
_SIDE = 64


@dataclass(frozen=True)
class OrderFlags(ComparisonFlags):
    """Pretrain missing runs, and measure poses and actions. Views have at least 64 pixels.

    Args:
        keypoints: protocol of key points.
    """

    data: str = "clips:2000"
    out: str = "results/shuffle_and_learn"
    runs: str = "runs/clips"
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = ("predict-frame_order", "predict-rotation", "supervised")
    keypoints: Keypoints = field(default_factory=Keypoints)


def main(flags: OrderFlags) -> None:
    """Print the tables by layer and write the report."""
    flags = small(flags, "clips:300")
    flags = replace(flags, image_size=max(flags.image_size, _SIDE))
    if flags.local:
        flags = replace(flags, methods=flags.methods[:1])
    names = ["keypoints", "video", "patches"]
    configs = {
        "keypoints": flags.keypoints,
        "video": Video(linear=Linear(schedule="fast")),
        "patches": Patches(of="frames"),
    }
    runs = trained(flags, names)
    measured(runs, flags, names, layers=["all"], configs=configs)
    reported(runs, flags, names, besides=("pose_distance", "mean_distance"))


if __name__ == "__main__":
    command(main, OrderFlags)
