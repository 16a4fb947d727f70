"""How many permutations a jigsaw should have: for predicting which one it was, and for PIRL, which compares.

Command:  python experiments/sweep_jigsaw.py --data DATA --out results/sweep-jigsaw --runs RUNS
Hardware: 2 CPU cores, 24 GB, no GPU; one run at a time.
Time:     planned: 10 trials of 2 seeds, about an hour and a half. With --local, on 1,500 drawn images: about 2 minutes.
Expect:   as in the PIRL paper (arXiv 1912.01991, section 5): PIRL gains from more permutations and lies above
          prediction at every number of them. Whether it shows at this size is what the report says.

DATA has the splits "train" and "test", such as CIFAR-10 in Hugging Face's Parquet layout. The same command goes on with
what is in RUNS.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Flags:
    """Sweeps the number of permutations for both uses of a jigsaw and writes the table and the report.

    Args:
        data: images with the splits "train" and "test"; drawn shapes by default.
        out: where the report goes, a path or a URI.
        runs: where the sweep is kept; by default a temporary folder.
        permutations: sizes of the set.
        seeds: of every trial.
        images: of the train split, that are learned from.
        epochs: visits to every image.
        workers: Ray Train workers of a run.
        local: a few drawn images and one size, to see that it works.
    """

    data: str = "shapes:20000"
    out: str = "results/sweep-jigsaw"
    runs: str = ""
    permutations: tuple[int, ...] = (10, 100, 701, 2000, 5000)
    seeds: tuple[int, ...] = (0, 1)
    images: int = 10_000
    epochs: float = 6
    workers: int = 1
    local: bool = False


def main(flags: Flags) -> None:
    """Runs what is missing of the sweep, prints its table and writes its report."""
    if flags.local:
        flags = replace(flags, data="shapes:1500", seeds=(0,), images=1500, epochs=1, permutations=(100,))
    cluster.start()
    runs = Folder(flags.runs or tempfile.mkdtemp(prefix="raysl-sweep-jigsaw-"))
    shapes = flags.data.startswith("shapes:")
    train, test = (
        (flags.data, "shapes:1000#test") if shapes else (f"{flags.data}#train", f"{flags.data}#test")
    )
    images = subset(resolve(train), flags.images, runs / f"images-{flags.images}")
    base = Pretraining(
        data=str(images.folder),
        run="-",
        method="pirl-jigsaw",
        epochs=flags.epochs,
        batch_size=128,
        workers=flags.workers,
        optim=OptimConfig(lr=0.12, warmup=0.05),
        # What a small trunk and a short run want; see results/cifar10.
        parts={"pirl": Pirl(temperature=0.2, head="bn", num_negatives=min(4096, images.num_images - 1))},
    )
    sizes = ",".join(map(str, flags.permutations))
    config = SweepConfig(
        out=str(runs / "sweep"),
        test=test,
        vary=("method=predict-jigsaw,pirl-jigsaw", f"num_permutations={sizes}"),
        seeds=flags.seeds,
    )
    rows = sweep(base, config)
    Console().print(table.render(rows, config.probe, base.epochs))
    Folder(flags.out).write("rows.jsonl", jsonl(rows))
    print(f"{report(config.out, ReportConfig(out=flags.out))}/index.html")


if __name__ == "__main__":
    main(tyro.cli(Flags))
