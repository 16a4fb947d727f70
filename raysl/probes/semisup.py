"""Semi-supervised learning: the whole network trained on a small share of the labels.

Hénaff et al. 2020, "Data-efficient image recognition with contrastive predictive coding", and PIRL (Misra and van der
Maaten 2020, table 3): ImageNet with 1 % and 10 % of its labels. The schedule is PIRL's as in VISSL: 70 epochs, a
learning rate of 0.01 for 256 images, divided by ten after epoch 30, no weight decay, random crops and mirroring. Top-5
of a ResNet-50 (1 % / 10 %, in %): PIRL 57.2 / 83.8, Jigsaw 45.3 / 79.3, random weights 22.0 / 59.0. Three differences:
images are sampled by class with the seed of the run, while theirs are fixed lists; momentum is plain and not
Nesterov's; the classifier starts from zero weights.

A share of a small data set gives few steps. It needs more epochs, smaller batches and a larger `head_lr`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray

from raysl import rng
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.extraction import NetworkEncoder
from raysl.fields import Bounds
from raysl.optim import OptimConfig
from raysl.probes import Row, Subject, sample_each_class
from raysl.probes._finetuning import FinetuningConfig, labels_of, measure
from raysl.probes._task import TaskProbe, run_tasks


@dataclass(frozen=True)
class Config(FinetuningConfig):
    """Protocol of learning from a share of the labels; for the other fields see `FinetuningConfig`.

    Args:
        shares: shares of the train images of each class (at least one image) whose labels are used, each in (0, 1];
            the first is that of the primary metric.
    """

    version: ClassVar[int] = 1
    epochs: Annotated[int, Bounds(1, 10**6)] = 70
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=0.01, weight_decay=0.0, schedule="step", milestones=(30 / 70,))
    )
    shares: tuple[Annotated[float, Bounds(1e-9, 1)], ...] = (0.01, 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.shares)) < len(self.shares):
            raise UserError(f"--semisup.shares is {self.shares}; give each share once.")


class Semisup(TaskProbe[Config]):
    """Top-1 from a share of the labels. Names end in the share, as top1@1%; rows have the layer "pooled"."""

    learns = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.primary_metric = f"top1{_suffix(config.shares[0])}"

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError if the images do not suit the probe; see `labels_of`."""
        labels_of("semisup", train, test)

    def examine(self, subject: Subject) -> Iterator[Row]:
        """Yield for each share accuracies, the mean training loss of the last epoch and the number of images.

        Yields nothing for pixels, which cannot be trained. Each share is a task of `run_tasks`. Raises UserError as
        `labels_of`, or if training has diverged.
        """
        if not isinstance(subject.encoder, NetworkEncoder):
            return
        labels = labels_of("semisup", subject.train, subject.test)
        chosen = [few(labels[0], share, subject.seed) for share in self.config.shares]
        suffixes = [_suffix(share) for share in self.config.shares]
        calls = [
            ("semisup", subject, self.config, chosen_n, labels, suffix)
            for chosen_n, suffix in zip(chosen, suffixes, strict=True)
        ]
        for rows, chosen_n, suffix in zip(run_tasks(measure, calls), chosen, suffixes, strict=True):
            yield from rows
            yield Row(f"images{suffix}", len(chosen_n), rows[0].layer)


def few(labels_n: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Return int64, sorted: indices of a share of the images of each class, at least one."""
    order_n = rng.generator("semisup", seed).permutation(len(labels_n))
    return sample_each_class(order_n, labels_n, lambda count: max(1, round(share * count)))


def _suffix(share: float) -> str:
    return f"@{100 * share:g}%"
