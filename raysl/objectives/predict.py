"""Predict the property of the transform from the transformed image: the covariant use of a pretext task.

With v_It the backbone's features of the transformed image and z the property of the transform, such as the number of the
permutation,

    L = -log softmax(W v_It)_z                                                          (PIRL, eq. 2)

Features of several crops are projected one by one and joined in their order. With jigsaw: Noroozi and Favaro, arXiv
1603.09246 (which permutation); with rotation: Gidaris et al., arXiv 1803.07728 (which quarter turn). Linear probes of
ResNet-50 on ImageNet as compared in the PIRL paper: jigsaw 45.7 % from its fourth stage and 34.2 % from its last,
rotation 48.9 %. With a dense transform (colorization, inpainting), its own head decodes the target from the pooled
features, and its own loss judges it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from raysl import pretext
from raysl.backbone.network import encode
from raysl.contrastive.bank import MemoryBank
from raysl.errors import UserError
from raysl.objectives import Loss, Setup
from raysl.stream.reader import Batch


@dataclass(frozen=True)
class Config:
    """Hyperparameters of the prediction.

    Args:
        crop_width: numbers kept of each crop before they are concatenated; only for transforms of several crops
            (1,000 for a ResNet-50 jigsaw).
    """

    crop_width: int = 256

    def __post_init__(self) -> None:
        if self.crop_width < 1:
            raise UserError(f"predict.crop_width is {self.crop_width}; it must be at least 1.")


class Predict(nn.Module):
    """A classifier of the transform's label on the features of all its crops, or the head that a dense transform
    brings along."""

    predicts = True
    bank_dim = 0

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__()
        transform = setup.transform("predict")
        self.dense = pretext.dense(transform)
        if self.dense is None and transform.num_labels < 2:
            raise UserError(
                f"There is nothing to predict: the transform has {transform.num_labels} label(s). Use a transform "
                "with labels, such as 'predict-jigsaw' with more permutations, or compare it: 'pirl-...'."
            )
        self.views = {"transformed": transform}
        # Where each crop has a label of its own, each is a sample of its own.
        self.per_crop = pretext.label_per_crop(transform)
        crops = 1 if self.per_crop else transform.num_crops
        width = setup.width
        if crops > 1:
            # BatchNorm sees all crops of all images together, so that no slot has statistics of its own.
            self.project: nn.Module = nn.Sequential(
                nn.Linear(width, config.crop_width), nn.BatchNorm1d(config.crop_width), nn.ReLU(inplace=True)
            )
            width = config.crop_width
        else:
            self.project = nn.Identity()
        if self.dense is None:
            self.classify = nn.Linear(crops * width, transform.num_labels)
        else:
            self.decode = self.dense.head(crops * width)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits (b, labels), or (b * p, labels) where each crop has a label; for a dense transform, what its head
        puts out."""
        features_bpd = encode(backbone, views["transformed"])
        if self.per_crop:
            features_bpd = features_bpd.flatten(0, 1)[:, None]
        b, p = features_bpd.shape[:2]
        projected = self.project(features_bpd.flatten(0, 1)).view(b, p, -1)
        if self.dense is None:
            return {"logits": self.classify(projected.flatten(1))}
        return {"decoded": self.decode(projected.flatten(1))}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Cross-entropy, or the transform's own loss, averaged over the batch, and over crops that have labels."""
        if self.dense is not None:
            return Loss(self.dense.loss(outputs["decoded"].float(), batch.targets["transformed"]), {})
        logits_bk = outputs["logits"].float()
        label_b = batch.targets["transformed"].flatten()
        correct = (logits_bk.argmax(dim=1) == label_b).float().mean()
        return Loss(F.cross_entropy(logits_bk, label_b), {"accuracy": correct})
