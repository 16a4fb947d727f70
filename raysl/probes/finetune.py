"""Fine-tuning: the whole network trained on all labels, with a linear classifier on its output.

It measures the network as an initialisation, while the linear probe measures the representation. The schedule is that
of VISSL's benchmark on ImageNet (Goyal et al. 2021): 105 epochs, a learning rate of 0.1 for 256 images, divided by ten
after epochs 30, 60, 90 and 100, no weight decay, random crops and mirroring. VISSL uses Nesterov momentum, and this
probe plain momentum. On small data sets a few epochs give much the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np

from raysl.extraction import Trainable
from raysl.fields import Bounds
from raysl.optim import OptimConfig
from raysl.probes import Row, Subject
from raysl.probes._finetuning import FinetuningConfig, labels_of, measure
from raysl.probes._task import run_tasks


@dataclass(frozen=True)
class Config(FinetuningConfig):
    """Protocol of fine-tuning; see `FinetuningConfig`."""

    version: ClassVar[int] = 1
    epochs: Annotated[int, Bounds(1, 10**6)] = 105
    batch_size: Annotated[int, Bounds(2, 10**6)] = 256
    head_lr: Annotated[float, Bounds(1e-9, 1e9)] = 1.0
    min_scale: Annotated[float, Bounds(1e-6, 1)] = 0.08
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=0.1, weight_decay=0.0, schedule="step", milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105)
        )
    )


class Finetune:
    """Top-1 of the trained network; its rows have the layer "pooled"."""

    primary_metric = "top1"
    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def examine(self, subject: Subject) -> Iterator[Row]:
        """Yield accuracies and the mean training loss of the last epoch; nothing for pixels, which cannot be trained.

        Runs one Ray task, on a GPU if there are any.

        Raises:
            UserError: the images do not suit the probe (see `labels_of`), or training has diverged.
        """
        if not isinstance(subject.encoder, Trainable):
            return
        labels = labels_of("finetune", subject)
        everything_n = np.arange(len(labels[0]), dtype=np.int64)
        (rows,) = run_tasks(measure, [("finetune", subject, self.config, everything_n, labels)])
        yield from rows
