"""Read surface normals out of the layers of pretrained and untrained networks.

Command:  python experiments/normals.py --data clips:2000 --images 24000 --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 8 minutes for each missing run, a minute for a probe. With --local: a few minutes.
Expect:   pretrained layers read normals better than untrained ones, and res3 better than res4. See results/video.

The probe `normals`: a linear map from each place of a layer, judged as NYU-v2 is. Clips bring their normals; with
--normals.data FOLDER the runs are probed on pairs of images and normals of your own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from raysl.experiment.comparison import ComparisonFlags, measured, reported, small, trained
from raysl.experiment.script import command
from raysl.probes.normals import Config as Normals

_SIDE = 64


@dataclass(frozen=True)
class NormalFlags(ComparisonFlags):
    """Pretrain missing runs and measure normals. Views have at least 64 pixels.

    Args:
        normals: protocol of the probe.
    """

    data: str = "clips:2000"
    out: str = "results/normals"
    runs: str = "runs/clips"
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = ("predict-frame_order", "predict-rotation", "pirl-jigsaw", "supervised")
    normals: Normals = field(default_factory=Normals)


def main(flags: NormalFlags) -> None:
    """Print the table by layer and write the report."""
    flags = small(flags, "clips:300")
    flags = replace(flags, image_size=max(flags.image_size, _SIDE))
    if flags.local:
        flags = replace(flags, methods=flags.methods[1:2])
    runs = trained(flags, ["normals"])
    measured(runs, flags, ["normals"], layers=["all"], configs={"normals": flags.normals})
    reported(runs, flags, ["normals"], besides=("mean_angle", "median_angle"))


if __name__ == "__main__":
    command(main, NormalFlags)
