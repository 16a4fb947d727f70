"""Supervised: predict the labels of the data set. The upper bound for the other objectives.

With v_I the backbone's features of the image I and y its label,

    L = -log softmax(W v_I)_y

In the PIRL paper, a linear probe of a ResNet-50 that was trained so on ImageNet has 75.9 % top-1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode
from raysl.errors import UserError
from raysl.fields import Bounds, Checked
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of the classification.

    Args:
        label_smoothing: share of the target that is spread over all classes, in 0..1.
    """

    label_smoothing: Annotated[float, Bounds(0, below=1)] = 0.0


class Supervised(Base):
    """A linear classifier of the labels."""

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        setup.no_transform("supervised")
        if setup.num_classes < 2:
            raise UserError(
                f"The objective 'supervised' needs labels of at least two classes and the data set has "
                f"{setup.num_classes}. Ingest a source with labels, such as one folder per class, or choose an "
                "objective without labels; `raysl methods` lists them."
            )
        self.views = {"image": setup.identity}
        self.classify = nn.Linear(setup.width, setup.num_classes)
        self.chance = math.log(setup.num_classes)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute logits (b, classes)."""
        return {"logits": self.classify(encode(backbone, views["image"])[:, 0])}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the cross-entropy, averaged over the batch."""
        logits_bk, labels_b = outputs["logits"].float(), batch.labels_b
        assert labels_b is not None
        loss = F.cross_entropy(logits_bk, labels_b, label_smoothing=self.config.label_smoothing)
        correct = (logits_bk.argmax(dim=1) == labels_b).float().mean()
        return Loss(loss, {"accuracy": correct})
