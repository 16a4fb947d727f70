"""Predicting a rotation on CIFAR-10-sized images: is the representation better than an untrained one?

Command:  python experiments/pretrain_rotation.py --data DATA --out results/predict-rotation
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     planned: about 15 minutes a seed. With --local, on 6,000 drawn images: about 2 minutes.
Expect:   kNN top-1 on the test split above the same trunk with random weights.

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
    out: str = "results/predict-rotation"
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
    runs = Folder(flags.runs or tempfile.mkdtemp(prefix="raysl-rotation-"))
    rows = []
    for seed in flags.seeds:
        config = Pretraining(
            data=train,
            run=str(runs / f"predict-rotation-{seed}"),
            method="predict-rotation",
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
