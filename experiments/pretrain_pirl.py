"""PIRL with a jigsaw on CIFAR-10-sized images: is the representation better than an untrained one?

Command:  python experiments/pretrain_pirl.py --data DATA --out results/cifar10
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     about 15 minutes a seed. With --local, on 6,000 drawn images: about 2 minutes.
Expect:   kNN top-1 on the test split at least 6 points above the same trunk with random weights.

DATA is a folder or URI with the splits "train" and "test", such as CIFAR-10 in Hugging Face's Parquet layout.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import tyro
from rich.console import Console

from raysl import cluster
from raysl.config import Pretraining
from raysl.objectives.pirl import Config as Pirl
from raysl.optim import OptimConfig
from raysl.pretrain import pretrain
from raysl.probe import probe, tables
from raysl.run import jsonl
from raysl.storage import Folder


@dataclass(frozen=True)
class Flags:
    """Pretrains PIRL once for each seed and probes every run.

    Args:
        data: images with the splits "train" and "test"; drawn shapes by default.
        out: where the rows go, a path or a URI.
        runs: where the runs go; by default a temporary folder.
        seeds: one run each.
        epochs: visits to every image.
        workers: Ray Train workers.
        local: a few thousand drawn images and one epoch, to see that it works.
    """

    data: str = "shapes:50000"
    out: str = "results/cifar10"
    runs: str = ""
    seeds: tuple[int, ...] = (0, 1)
    epochs: float = 8
    workers: int = 2
    local: bool = False


def main(flags: Flags) -> None:
    """Runs all seeds, prints their tables and writes one file of rows."""
    cluster.start()
    train, test = ("shapes:6000#train", "shapes:1000#test") if flags.local else _splits(flags.data)
    runs = Folder(flags.runs or tempfile.mkdtemp(prefix="raysl-pirl-"))
    rows = []
    for seed in flags.seeds[:1] if flags.local else flags.seeds:
        config = Pretraining(
            data=train,
            run=str(runs / f"pirl-jigsaw-{seed}"),
            method="pirl-jigsaw",
            epochs=1 if flags.local else flags.epochs,
            workers=flags.workers,
            seed=seed,
            optim=OptimConfig(lr=0.12),
            parts={"pirl": Pirl(temperature=0.2, head="bn")},
        )
        run = pretrain(config)
        rows += probe(run, train, test)
    for table in tables(rows):
        Console().print(table)
    Folder(flags.out).write("rows.jsonl", jsonl(rows))


def _splits(data: str) -> tuple[str, str]:
    return (
        (f"{data}#train", f"{data}#test") if not data.startswith("shapes:") else (data, "shapes:10000#test")
    )


if __name__ == "__main__":
    main(tyro.cli(Flags))
