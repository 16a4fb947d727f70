"""Learn from patches along tracks, and find the same object in another frame: Wang and Gupta in small.

Command:  python experiments/tracking.py --data clips:2000 --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     planned: 5 minutes a seed. With --local, on 1,000 drawn clips: a CPU minute a seed.
Expect:   the other patch of a track is nearest more often in the features of the run than in those of the same network
          with random weights.

Patches of held-out clips, in pairs along their tracks: each is a query, and all others of the batch are candidates. The
features are those of the pooled layer, centered, compared by cosine. No class and no key point is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from raysl.backbone.network import BackboneConfig, encode
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.experiment.held_out import batches, held_out
from raysl.experiment.script import Flags, command, locally, pretrained
from raysl.extraction import Trained
from raysl.extraction.heads import trained_model
from raysl.ingestion import open_or_ingest, splits
from raysl.model import Model
from raysl.optim import OptimConfig
from raysl.run import jsonl
from raysl.storage import Folder


@dataclass(frozen=True)
class TrackingFlags(Flags):
    """Learn from tracks, once for each seed, and compare with random weights.

    Args:
        epochs: visits to every clip.
    """

    data: str = "clips:2000"
    out: str = "results/video/tracking"
    runs: str = "runs/tracking"
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: float = 20


def main(flags: TrackingFlags) -> None:
    """Print how often the other patch of a track is the nearest."""
    flags = locally(flags, data="clips:1000", epochs=10, seeds=flags.seeds)
    train, test = splits(flags.data)
    rows = []
    for seed in flags.seeds:
        config = Pretraining(
            train,
            str(Folder(flags.runs) / f"triplet-tracking-{seed}"),
            "triplet-tracking",
            flags.epochs,
            batch_size=64,
            workers=flags.run_workers,
            seed=seed,
            view=ViewConfig(image_size=32, recipe="mocov2"),
            backbone=BackboneConfig(norm="group"),
            optim=OptimConfig(name="adamw", lr=0.008, warmup=0.05),
        )
        run = pretrained(config, flags)
        found = {
            "task": "tracking",
            "data": flags.data,
            "epochs": flags.epochs,
            "seed": seed,
            "trained": nearest(trained_model(Trained(run, run.newest())), open_or_ingest(test)),
            "untrained": nearest(Model.of(config, open_or_ingest(train)).eval(), open_or_ingest(test)),
            **held_out(run, open_or_ingest(test)),
        }
        print(
            f"seed {seed}: the other patch is nearest for {found['trained']:.1%} of the patches, "
            f"{found['untrained']:.1%} with random weights",
            flush=True,
        )
        rows.append(found)
        Folder(flags.out).write("rows.jsonl", jsonl(rows))


def nearest(model: Model, dataset: DataSet) -> float:
    """Return the share of patches whose nearest patch of the batch is the other one of their track."""
    right, count = 0, 0
    for batch in batches(model, dataset):
        features_qd = encode(model.backbone, batch.views["pair"]).flatten(0, 1)
        unit_qd = F.normalize(features_qd - features_qd.mean(dim=0), dim=1)
        cosine_qq = (unit_qd @ unit_qd.T).fill_diagonal_(-2)
        # Patches of a pair lie side by side: 0 and 1, 2 and 3.
        other_q = torch.arange(len(unit_qd)) ^ 1
        right += int((cosine_qq.argmax(dim=1) == other_q).sum())
        count += len(unit_qd)
    return right / count


if __name__ == "__main__":
    command(main, TrackingFlags)
