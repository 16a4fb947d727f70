"""Semi-supervised learning: the whole network trained on a small share of the labels.

Hénaff et al. 2020, "Data-efficient image recognition with contrastive predictive coding", and PIRL (Misra and van der
Maaten 2020, table 3): ImageNet with 1 % and 10 % of its labels. The schedule is PIRL's as VISSL has it: 70 epochs, a
learning rate of 0.01 for 256 images, a tenth of it after epoch 30, no weight decay, random crops and mirror images.
Top-5 with a ResNet-50 (1 % / 10 %, in %): PIRL 57.2 / 83.8, Jigsaw 45.3 / 79.3, from random weights 22.0 / 59.0. Three
things differ: images are drawn for each class and by the seed of the run, where there the lists are fixed; momentum is
plain and not Nesterov's; and the classifier begins with weights of zero.

A share of a small set makes few steps: there, more epochs, smaller batches and a larger `head_lr` are needed before a
network learns at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raysl import rng
from raysl.errors import UserError
from raysl.extraction import Trainable
from raysl.optim import OptimConfig
from raysl.probes import Row, Subject
from raysl.probes._task import elsewhere
from raysl.probes._tuning import Tuning, labels_of, measure


@dataclass(frozen=True)
class Config(Tuning):
    """Protocol of learning from a share of the labels; its other fields are those of `Tuning`.

    Args:
        shares: of the train images of each class whose labels are seen, at least one image of each; the first one
            gives the headline.
        version: see `raysl.probes`.
    """

    epochs: int = 70
    batch_size: int = 256
    head_lr: float = 1.0
    min_scale: float = 0.08
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=0.01, weight_decay=0.0, schedule="step", milestones=(30 / 70,))
    )
    shares: tuple[float, ...] = (0.01, 0.1)
    version: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise UserError(f"semisup.shares is {self.shares}; it must hold shares above 0 and up to 1.")
        if len(set(self.shares)) < len(self.shares):
            raise UserError(f"semisup.shares is {self.shares}; give each share once.")


class Semisup:
    """Top-1 from a share of the labels. Rows end in their share, as in top1@1%, and stand at the layer "pooled"."""

    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.headline = f"top1{_suffix(config.shares[0])}"

    def examine(self, subject: Subject) -> Iterator[Row]:
        """Yields for each share top-1, top-5 where there are more than five classes, the mean loss of the last epoch
        and the number of images; nothing for an encoder that cannot be trained, such as pixels. Runs one task of Ray
        for each share, on a GPU if there are any.

        Raises:
            UserError: the images do not suit the probe (see `raysl.probes._tuning.labels_of`), or training diverged.
        """
        if not isinstance(subject.encoder, Trainable):
            return
        train_n, test_n = labels_of(subject)
        chosen = [few(train_n, share, subject.seed) for share in self.config.shares]
        suffixes = [_suffix(share) for share in self.config.shares]
        calls = [
            (subject, self.config, chosen_n, train_n, test_n, suffix)
            for chosen_n, suffix in zip(chosen, suffixes, strict=True)
        ]
        found = elsewhere(measure, calls)
        for rows, chosen_n, suffix in zip(found, chosen, suffixes, strict=True):
            yield from rows
            yield Row(f"images{suffix}", len(chosen_n), rows[0].layer)


def few(labels_n: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.int64]:
    """int64, sorted: indices of a share of the images of each class, at least one. Those of a smaller share are among
    those of a larger one."""
    order_n = rng.generator("semisup", seed).permutation(len(labels_n))
    classes, counts = np.unique(labels_n, return_counts=True)
    picked = [
        order_n[labels_n[order_n] == c][: max(1, round(share * int(count)))]
        for c, count in zip(classes, counts, strict=True)
    ]
    return np.sort(np.concatenate(picked))


def _suffix(share: float) -> str:
    return f"@{100 * share:g}%"
