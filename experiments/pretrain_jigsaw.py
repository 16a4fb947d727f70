"""Predicting a jigsaw on CIFAR-10-sized images: is the representation better than an untrained one?

Command:  python experiments/pretrain_jigsaw.py --data DATA --out results/predict-jigsaw
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     planned: about 15 minutes a seed. With --local, on 6,000 drawn images: about 2 minutes.
Expect:   kNN little above the same trunk untrained, or below it: the last layer is for telling permutations apart.
          A ResNet-50 on ImageNet, too, is at its best before its last stage (45.7 against 34.2 % top-1).

DATA is a folder or URI with the splits "train" and "test", such as CIFAR-10 in Hugging Face's Parquet layout.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace

import tyro
from rich.console import Console

from raysl import cluster
from raysl.config import Pretraining
from raysl.optim import OptimConfig
from raysl.pretrain import pretrain
from raysl.probe import probe, tables
from raysl.run import jsonl
from raysl.storage import Folder


@dataclass(frozen=True)
class Flags:
    """Pretrains once for each seed and probes every run.

    Args:
        data: images with the splits "train" and "test"; drawn shapes by default.
        out: where the rows go, a path or a URI.
        runs: where the runs go, and are continued; by default a temporary folder.
        seeds: one run each.
        epochs: visits to every image.
        workers: Ray Train workers.
        local: a few thousand drawn images and one epoch, to see that it works.
    """

    data: str = "shapes:50000"
    out: str = "results/predict-jigsaw"
    runs: str = ""
    seeds: tuple[int, ...] = (0, 1)
    epochs: float = 8
    workers: int = 2
    local: bool = False


def main(flags: Flags) -> None:
    """Runs all seeds, prints their tables and writes one file of rows."""
    if flags.local:
        flags = replace(flags, data="shapes:6000", seeds=(0,), epochs=1)
    cluster.start()
    shapes = flags.data.startswith("shapes:")
    train, test = (
        (flags.data, "shapes:1000#test") if shapes else (f"{flags.data}#train", f"{flags.data}#test")
    )
    runs = Folder(flags.runs or tempfile.mkdtemp(prefix="raysl-jigsaw-"))
    rows = []
    for seed in flags.seeds:
        config = Pretraining(
            data=train,
            run=str(runs / f"predict-jigsaw-{seed}"),
            method="predict-jigsaw",
            epochs=flags.epochs,
            workers=flags.workers,
            seed=seed,
            optim=OptimConfig(lr=0.12, warmup=0.05),
        )
        rows += probe(pretrain(config), train, test)
    for table in tables(rows):
        Console().print(table)
    Folder(flags.out).write("rows.jsonl", jsonl(rows))


if __name__ == "__main__":
    main(tyro.cli(Flags))
