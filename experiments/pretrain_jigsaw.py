"""Predict a jigsaw on images of the size of CIFAR-10, and compare the features with untrained ones.

Command:  python experiments/pretrain_jigsaw.py --data DATA --out results/predict-jigsaw
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     planned: about 15 minutes a seed. With --local, on 6,000 drawn images: about 2 minutes.
Expect:   kNN near the untrained backbone or below it, because the last layer separates permutations. The features of a
          ResNet-50 on ImageNet are also best before the last stage (45.7 against 34.2 % top-1).
"""

from __future__ import annotations

from dataclasses import dataclass

from raysl.config import Pretraining
from raysl.experiment.script import Flags, command, locally, pretrain_seeds
from raysl.optim import OptimConfig


@dataclass(frozen=True)
class JigsawFlags(Flags):
    """Predict the order of the tiles, once for each seed, and probe every run.

    Args:
        epochs: visits to every image.
    """

    data: str = "shapes:50000"
    out: str = "results/predict-jigsaw"
    runs: str = "runs/predict-jigsaw"
    epochs: float = 8


def main(flags: JigsawFlags) -> None:
    """Run all seeds."""
    flags = locally(flags, data="shapes:6000", epochs=1)
    optim = OptimConfig(lr=0.12, warmup=0.05)
    pretrain_seeds(Pretraining("-", "-", "predict-jigsaw", epochs=flags.epochs, optim=optim), flags)


if __name__ == "__main__":
    command(main, JigsawFlags)
