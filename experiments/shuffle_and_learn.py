"""Learn from the order of frames, and read key points out of the features: Shuffle and Learn in small.

Command:  python experiments/shuffle_and_learn.py --data clips:2000 --images 24000 --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 8 minutes for each missing run, a minute for a probe. With --local: five CPU minutes a run, one a probe.
Expect:   key points from frame order better than from an untrained network; actions need not be.

Shuffle and Learn (Misra, Zitnick and Hebert 2016, arXiv 1603.08561) transfers frame order to poses of people (FLIC and
MPII) and to actions; the lecture's figure 10. Here the network is frozen and the figures are drawn: the probes
`keypoints`, `video`, and `patches` of frames, on every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raysl.evaluation.train_test_overlap import refuse_same_images
from raysl.experiment.comparison import ComparisonFlags, measured, reported, settings
from raysl.experiment.held_out import held_out
from raysl.experiment.script import command, locally, pretrained
from raysl.ingestion import open_or_ingest, splits
from raysl.probes.keypoints import Config as Keypoints
from raysl.probes.linear import Config as Linear
from raysl.probes.patches import Config as Patches
from raysl.probes.video import Config as Video
from raysl.run import Run, jsonl
from raysl.storage import Folder

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
    """Print the accuracy of frame order on held-out clips and the tables by layer, and write the report."""
    # The optimizer needs many steps more than it needs large batches.
    flags = locally(flags, data="clips:1000", images=30_000, batch_size=64, seeds=flags.seeds)
    flags = replace(flags, image_size=max(flags.image_size, _SIDE))
    names = ["keypoints"] if flags.local else ["keypoints", "video", "patches"]
    configs = {
        "keypoints": flags.keypoints,
        "video": Video(linear=Linear(schedule="fast")),
        "patches": Patches(of="frames"),
    }
    train, test = splits(flags.data)
    refuse_same_images(names, open_or_ingest(train), open_or_ingest(test))
    runs = [_trained(flags, method, seed, train) for method in flags.methods for seed in flags.seeds]
    _ordered(runs, flags)
    # A readout takes half a minute for each layer, so a small run compares the first and the last one.
    measured(runs, flags, names, layers=["conv1", "res4"] if flags.local else ["all"], configs=configs)
    reported(runs, flags, names, besides=("pose_distance", "mean_distance"))


def _trained(flags: OrderFlags, method: str, seed: int, train: str) -> Run:
    """Return a run whose views and optimizer are those of frame order, so that only the task differs."""
    order, own = (
        settings(flags, name, seed, train, Folder(flags.runs)) for name in ("predict-frame_order", method)
    )
    return pretrained(replace(own, view=order.view, optim=order.optim), flags)


def _ordered(runs: Sequence[Run], flags: OrderFlags) -> None:
    """Print how often the runs of frame order are right on held-out clips, and write the rows."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        config = run.config()
        if config.method == "predict-frame_order":
            scores = held_out(run, open_or_ingest(splits(flags.data)[1]))
            print(f"seed {config.seed}: frame order {scores['accuracy']:.1%} on held-out clips", flush=True)
            about = {
                "method": config.method,
                "data": flags.data,
                "images": flags.images,
                "steps": run.newest().step,
            }
            rows.append({**about, "seed": config.seed, **scores})
    Folder(flags.out).write("frame_order.jsonl", jsonl(rows))


if __name__ == "__main__":
    command(main, OrderFlags)
