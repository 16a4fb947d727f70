"""Predict a rotation on images of the size of CIFAR-10, and compare the features with untrained ones.

Command:  python experiments/pretrain_rotation.py --data DATA --out results/predict-rotation
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     planned: about 15 minutes a seed. With --local, on 6,000 drawn images: about 2 minutes.
Expect:   kNN top-1 on the test split of CIFAR-10 above the same backbone with random weights; on Tiny ImageNet it is
          below. See results/lectures.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysl.config import Pretraining
from raysl.experiment.script import Flags, command, locally, pretrain_seeds
from raysl.optim import OptimConfig


@dataclass(frozen=True)
class RotationFlags(Flags):
    """Predict the rotation, once for each seed, and probe every run.

    Args:
        epochs: visits to every image.
    """

    data: str = "shapes:50000"
    out: str = "results/predict-rotation"
    runs: str = "runs/predict-rotation"
    epochs: float = 8


def main(flags: RotationFlags) -> None:
    """Run all seeds."""
    flags = locally(flags, data="shapes:6000", epochs=1)
    optim = OptimConfig(lr=0.12, warmup=0.05)
    pretrain_seeds(Pretraining("-", "-", "predict-rotation", epochs=flags.epochs, optim=optim), flags)


if __name__ == "__main__":
    command(main, RotationFlags)
