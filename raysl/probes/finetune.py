"""Fine-tuning: the whole network trained on all labels, with a linear classifier on its output.

It measures the network as an initialization, while the linear probe measures the representation. The schedule is that
of VISSL's benchmark on ImageNet (Goyal et al. 2021): 105 epochs, a learning rate of 0.1 for 256 images, divided by ten
after epochs 30, 60, 90 and 100, no weight decay, random crops and mirroring. VISSL uses Nesterov momentum, and this
probe plain momentum. On small data sets a few epochs give much the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np

from raysl.dataset import DataSet
from raysl.extraction import NetworkEncoder
from raysl.fields import Bounds
from raysl.optim import OptimConfig
from raysl.probes import Row, Subject
from raysl.probes._finetuning import FinetuningConfig, labels_of, measure
from raysl.probes._task import TaskProbe


@dataclass(frozen=True)
class Config(FinetuningConfig):
    """Protocol of fine-tuning; see `FinetuningConfig`."""

    version: ClassVar[int] = 1
    epochs: Annotated[int, Bounds(1, 10**6)] = 105
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=0.1, weight_decay=0.0, schedule="step", milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105)
        )
    )


class Finetune(TaskProbe[Config]):
    """Top-1 of the trained network, other accuracies, and the mean training loss of the last epoch.

    Rows have the layer "pooled"; there are none for pixels, which cannot be trained.
    """

    primary_metric = "top1"
    needs = NetworkEncoder
    learns = True

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError if the images do not suit the probe; see `labels_of`."""
        labels_of("finetune", train, test)

    def rows(self, subject: Subject) -> list[Row]:
        """Return the rows. Raises UserError if training has diverged, or an image is damaged."""
        labels = labels_of("finetune", subject.train, subject.test)
        everything_n = np.arange(len(labels[0]), dtype=np.int64)
        return measure("finetune", subject, self.config, everything_n, labels)
