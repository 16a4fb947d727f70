"""Train PIRL with a jigsaw on images of the size of CIFAR-10, and compare the features with untrained ones.

Command:  python experiments/pretrain_pirl.py --data DATA --epochs 4 --out results/cifar10
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     about 15 minutes a seed. With --local, on 6,000 drawn images: about 2 minutes.
Expect:   kNN top-1 on the test split at least 6 points above the same backbone with random weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysl.config import Pretraining
from raysl.experiment.script import Flags, command, locally, pretrain_seeds
from raysl.objectives.pirl import Config as Pirl
from raysl.optim import OptimConfig


@dataclass(frozen=True)
class PirlFlags(Flags):
    """Pretrain PIRL once for each seed and probe every run.

    Args:
        epochs: visits to every image.
    """

    data: str = "shapes:50000"
    out: str = "results/pretrain-pirl"
    runs: str = "runs/pretrain-pirl"
    epochs: float = 8


def main(flags: PirlFlags) -> None:
    """Run all seeds, with hyperparameters for a small backbone and a short run; see results/cifar10."""
    flags = locally(flags, data="shapes:6000", epochs=1)
    base = Pretraining(
        data="-",
        run="-",
        method="pirl-jigsaw",
        epochs=flags.epochs,
        optim=OptimConfig(lr=0.12),
        parts={"pirl": Pirl(temperature=0.2, head="bn")},
    )
    pretrain_seeds(base, flags)


if __name__ == "__main__":
    command(main, PirlFlags)
