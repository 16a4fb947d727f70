"""Sweep the number of permutations of a jigsaw, for prediction and for PIRL.

Command:  python experiments/sweep_jigsaw.py --data DATA --out results/sweep-jigsaw --runs RUNS
Hardware: 2 CPU cores, 24 GB, no GPU; one run at a time.
Time:     planned: 10 trials of 2 seeds, about an hour and a half. With --local, on 1,500 drawn images: about 2 minutes.
Expect:   as in the PIRL paper (arXiv 1912.01991, section 5): PIRL gains from more permutations (confirmed on
          CIFAR-10, not on Tiny ImageNet; see results/lectures) and is above prediction at every number of them.

The same command resumes the sweep in RUNS.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysl.config import Pretraining
from raysl.experiment.script import Flags, command, drawn, held_out, locally, sweep_and_report
from raysl.objectives.pirl import Config as Pirl
from raysl.optim import OptimConfig
from raysl.storage import Folder
from raysl.tuning.config import SweepConfig


@dataclass(frozen=True)
class SweepFlags(Flags):
    """Sweep the number of permutations for both uses of a jigsaw, and write the table and the report.

    Args:
        permutations: sizes of the set.
        images: number of images of the train split to learn from.
        epochs: visits to every image.
        retry: try the trials again that failed before.
    """

    out: str = "results/sweep-jigsaw"
    runs: str = "runs/sweep-jigsaw"
    workers: int = 1
    permutations: tuple[int, ...] = (10, 100, 701, 2000, 5000)
    images: int = 10_000
    epochs: float = 6
    retry: bool = False


def main(flags: SweepFlags) -> None:
    """Run or complete the sweep, print its table and write its report."""
    flags = locally(flags, data="shapes:1500", images=1500, epochs=1, permutations=(100,))
    images = drawn(flags, flags.images)
    base = Pretraining(
        data=str(images.folder),
        run="-",
        method="pirl-jigsaw",
        epochs=flags.epochs,
        batch_size=128,
        workers=flags.run_workers,
        optim=OptimConfig(lr=0.12, warmup=0.05),
        # For a small backbone and a short run; see results/cifar10.
        parts={"pirl": Pirl(temperature=0.2, head="bn", num_negatives=min(4096, images.num_images - 1))},
    )
    config = SweepConfig(
        out=str(Folder(flags.runs) / "sweep"),
        validation=held_out(flags, images),
        vary=(
            "method=predict-jigsaw,pirl-jigsaw",
            f"num_permutations={','.join(map(str, flags.permutations))}",
        ),
        seeds=flags.seeds,
        retry=flags.retry,
    )
    sweep_and_report(base, config, flags)


if __name__ == "__main__":
    command(main, SweepFlags)
