"""The dials of PIRL on CIFAR-10-sized images: temperature, lambda, negatives and permutations, judged by kNN.

Command:  python experiments/sweep_pirl.py --data DATA --figure lambda --out results/sweep-pirl/lambda --runs RUNS
Hardware: 2 CPU cores, 24 GB, no GPU; one run at a time.
Time:     planned: about an hour for all dials together (8 trials, 2 seeds, ASHA), and for each figure with 3 seeds.
          With --local, on 1,500 drawn images: about 2 minutes.
Expect:   as in the PIRL paper (arXiv 1912.01991, section 5): the best lambda lies in the middle, more negatives help,
          more permutations help. Whether 10,000 small images show it is what the report says.

DATA has the splits "train" and "test", such as CIFAR-10 in Hugging Face's Parquet layout. The same command goes on with
what is in RUNS.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from typing import Literal

import tyro
from rich.console import Console

from raysl import cluster
from raysl.config import Pretraining
from raysl.ingest import resolve
from raysl.ingest.subset import subset
from raysl.objectives.pirl import Config as Pirl
from raysl.optim import OptimConfig
from raysl.report.page import ReportConfig, report
from raysl.run import jsonl
from raysl.storage import Folder
from raysl.sweep import table
from raysl.sweep.config import SweepConfig
from raysl.sweep.driver import sweep

# The paper's grids; of negatives, those that the images allow.
NEGATIVES = (64, 256, 1024, 4096, 8192, 16_000, 32_000)
GRIDS = {
    "lambda": "lambda=0,0.25,0.5,0.75,1",
    "permutations": "num_permutations=1,100,2000,10000,362880",
}


@dataclass(frozen=True)
class Flags:
    """Sweeps PIRL and writes the table and the report.

    Args:
        data: images with the splits "train" and "test"; drawn shapes by default.
        out: where the report goes, a path or a URI.
        runs: where the sweep is kept; by default a temporary folder.
        figure: one of the paper's three ablations, or all four dials together, drawn at random and stopped by ASHA.
        seeds: of every trial.
        samples: trials of "all".
        images: of the train split, that are learned from.
        epochs: visits to every image.
        workers: Ray Train workers of a run.
        local: a few drawn images and values, to see that it works.
    """

    data: str = "shapes:20000"
    out: str = "results/sweep-pirl"
    runs: str = ""
    figure: Literal["all", "lambda", "negatives", "permutations"] = "all"
    seeds: tuple[int, ...] = (0, 1)
    samples: int = 8
    images: int = 10_000
    epochs: float = 9
    workers: int = 1
    local: bool = False


def main(flags: Flags) -> None:
    """Runs what is missing of the sweep, prints its table and writes its report."""
    if flags.local:
        flags = replace(flags, data="shapes:1500", seeds=(0,), samples=2, images=1500, epochs=3)
    cluster.start()
    runs = Folder(flags.runs or tempfile.mkdtemp(prefix="raysl-sweep-pirl-"))
    train, test = splits(flags.data)
    images = subset(resolve(train), flags.images, runs / f"images-{flags.images}")
    base = Pretraining(
        data=str(images.folder),
        run="-",
        epochs=flags.epochs,
        batch_size=128,
        workers=flags.workers,
        optim=OptimConfig(lr=0.12, warmup=0.05),
        # What a small trunk and a short run want; see results/cifar10.
        parts={"pirl": Pirl(temperature=0.2, head="bn", num_negatives=min(4096, images.num_images - 1))},
    )
    config = replace(settings(flags, images.num_images), out=str(runs / flags.figure), test=test)
    rows = sweep(base, config)
    Console().print(table.render(rows, config.probe, base.epochs))
    Folder(flags.out).write("rows.jsonl", jsonl(rows))
    print(f"{report(config.out, ReportConfig(out=flags.out))}/index.html")


def settings(flags: Flags, num_images: int) -> SweepConfig:
    """What is tried."""
    negatives = [count for count in NEGATIVES if count < num_images]
    if flags.figure == "all":
        dials = (
            "temperature=0.05..0.5",
            "lambda=0..1",
            f"num_negatives={negatives[0]}..{negatives[-1]}",
            "num_permutations=100..10000",
        )
        return SweepConfig(
            "",
            "-",
            dials,
            seeds=flags.seeds,
            searcher="random",
            samples=flags.samples,
            scheduler="asha",
            rungs=2 if flags.local else 3,
        )
    grids = {**GRIDS, "negatives": f"num_negatives={','.join(map(str, negatives))}"}
    vary = (grids[flags.figure],)
    if flags.local:
        name, _, values = vary[0].partition("=")
        vary = (f"{name}={','.join(values.split(',')[1:3])}",)
    return SweepConfig("", "-", vary, seeds=flags.seeds)


def splits(data: str) -> tuple[str, str]:
    """Train and test."""
    return (data, "shapes:1000#test") if data.startswith("shapes:") else (f"{data}#train", f"{data}#test")


if __name__ == "__main__":
    main(tyro.cli(Flags))
