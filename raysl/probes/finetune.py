"""Fine-tuning: the whole network trained on all labels, with a linear classifier on its output.

It measures the network as a place to start from, where the linear probe measures the representation. The schedule is
that of VISSL's benchmark on ImageNet (Goyal et al. 2021): 105 epochs, a learning rate of 0.1 for 256 images, a tenth
of it after epochs 30, 60, 90 and 100, no weight decay, random crops and mirror images. Its momentum is Nesterov's, and
ours is plain. On small sets a few epochs say much the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from raysl.extraction import Trainable
from raysl.optim import OptimConfig
from raysl.probes import Row, Subject
from raysl.probes._task import elsewhere
from raysl.probes._tuning import Tuning, labels_of, measure


@dataclass(frozen=True)
class Config(Tuning):
    """Protocol of fine-tuning; its other fields are those of `Tuning`.

    Args:
        version: see `raysl.probes`.
    """

    epochs: int = 105
    batch_size: int = 256
    head_lr: float = 1.0
    min_scale: float = 0.08
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=0.1, weight_decay=0.0, schedule="step", milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105)
        )
    )
    version: int = 1


class Finetune:
    """Top-1 of the trained network; its rows stand at the layer "pooled"."""

    headline = "top1"
    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def examine(self, subject: Subject) -> Iterator[Row]:
        """Yields top-1, top-5 where there are more than five classes, and the mean loss of the last epoch; nothing for
        an encoder that cannot be trained, such as pixels. Runs one task of Ray, on a GPU if there are any.

        Raises:
            UserError: the images do not suit the probe (see `raysl.probes._tuning.labels_of`), or training diverged.
        """
        if not isinstance(subject.encoder, Trainable):
            return
        train_n, test_n = labels_of(subject)
        everything_n = np.arange(len(train_n), dtype=np.int64)
        (rows,) = elsewhere(measure, [(subject, self.config, everything_n, train_n, test_n)])
        yield from rows
