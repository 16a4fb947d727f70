"""Supervised: predict the label that the data set gives. The upper bound that the other objectives are held against.

With v_I the backbone's features of the image I and y its label,

    L = -log softmax(W v_I)_y

As compared in the PIRL paper, a linear probe of
ResNet-50 trained so on ImageNet: 75.9 % top-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode
from raysl.contrastive.bank import MemoryBank
from raysl.errors import UserError
from raysl.objectives import Loss, Setup
from raysl.stream.reader import Batch


@dataclass(frozen=True)
class Config:
    """Hyperparameters of the classification.

    Args:
        label_smoothing: share of the target that is spread over all classes, in 0..1.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"supervised.label_smoothing is {self.label_smoothing}; it is a share, from 0 (none) up to below 1."
            )


class Supervised(nn.Module):
    """A linear classifier of the data set's labels."""

    predicts = False
    bank_dim = 0

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__()
        setup.no_transform("supervised")
        if setup.num_classes < 1:
            raise UserError(
                "The objective 'supervised' needs labels, and the data set has none. Ingest a source with labels, such "
                "as one folder per class, or choose an objective without labels; `raysl methods` lists them."
            )
        self.config = config
        self.views = {"image": setup.identity}
        self.classify = nn.Linear(setup.width, setup.num_classes)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits (b, classes)."""
        return {"logits": self.classify(encode(backbone, views["image"])[:, 0])}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Cross-entropy, averaged over the batch."""
        logits_bk, labels_b = outputs["logits"].float(), batch.labels_b
        assert labels_b is not None
        loss = F.cross_entropy(logits_bk, labels_b, label_smoothing=self.config.label_smoothing)
        correct = (logits_bk.argmax(dim=1) == labels_b).float().mean()
        return Loss(loss, {"accuracy": correct})
