"""Predict the label of the transform from the transformed image.

With v_It the backbone's features of the transformed image and z the label of the transform, such as the number of the
permutation,

    L = -log softmax(W v_It)_z                                                          (PIRL, eq. 2)

Features of several crops are projected one by one and concatenated in their order. With jigsaw: Noroozi and Favaro,
arXiv 1603.09246 (which permutation); with rotation: Gidaris et al., arXiv 1803.07728 (which quarter turn). Linear
probes of ResNet-50 on ImageNet in the PIRL paper: jigsaw 45.7 % from the fourth stage and 34.2 % from the last,
rotation 48.9 %. A dense transform (colorization, inpainting) has its own head, which decodes the target from the
pooled features, and its own loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from raysl import pretext
from raysl.backbone.network import Backbone, encode, encode_maps
from raysl.errors import UserError
from raysl.fields import Bounds, Checked
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of the prediction.

    Args:
        crop_width: width of the projection of each crop before concatenation; only for transforms of several
            crops (1,000 for a ResNet-50 jigsaw).
        cells: side of the grid of cells to which the spatial map of a crop is averaged before the projection, so that
            the head sees where things are; 0 takes the pooled features, which do not say it.
        hidden: width of a hidden layer after the concatenation; 0 for a linear classifier, which cannot compare crops
            with each other.
    """

    crop_width: Annotated[int, Bounds(1, 65_536)] = 256
    cells: Annotated[int, Bounds(0, 64)] = 0
    hidden: Annotated[int, Bounds(0, 65_536)] = 0


class Predict(Base):
    """A classifier of the transform's label from the features of all crops, or the head of a dense transform."""

    predicts = True

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        transform = setup.transform("predict")
        self.dense = pretext.dense(transform)
        if self.dense is None and transform.num_labels < 2:
            raise UserError(
                f"The transform has {transform.num_labels} label(s), so there is nothing to predict. Use a transform "
                "with labels, such as 'predict-jigsaw' with more permutations, or an objective that compares, such as "
                "pirl."
            )
        self.views = {"transformed": transform}
        if self.dense is None:
            self.chance = float(getattr(transform, "chance", math.log(transform.num_labels)))
        # With a label for each crop, every crop is a sample.
        self.per_crop = pretext.label_per_crop(transform)
        crops = 1 if self.per_crop else transform.num_crops
        self.cells = config.cells
        width = setup.width * max(1, config.cells) ** 2
        if crops > 1:
            # BatchNorm sees all crops of all images together: separate statistics would reveal the position.
            self.project: nn.Module = nn.Sequential(
                nn.Linear(width, config.crop_width), nn.BatchNorm1d(config.crop_width), nn.ReLU(inplace=True)
            )
            width = config.crop_width
        else:
            self.project = nn.Identity()
        if self.dense is not None:
            self.decode = self.dense.head(crops * width)
        elif config.hidden:
            hidden = nn.Linear(crops * width, config.hidden), nn.ReLU(inplace=True)
            self.classify: nn.Module = nn.Sequential(*hidden, nn.Linear(config.hidden, transform.num_labels))
        else:
            self.classify = nn.Linear(crops * width, transform.num_labels)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute logits (b, labels), or (b * p, labels) with a label for each crop, or the dense head's output."""
        features_bpd = self._features(backbone, views["transformed"])
        if self.per_crop:
            features_bpd = features_bpd.flatten(0, 1)[:, None]
        b, p = features_bpd.shape[:2]
        projected = self.project(features_bpd.flatten(0, 1)).view(b, p, -1)
        if self.dense is None:
            return {"logits": self.classify(projected.flatten(1))}
        return {"decoded": self.decode(projected.flatten(1))}

    def _features(self, backbone: nn.Module, views_bpchw: Tensor) -> Tensor:
        if not self.cells:
            return encode(backbone, views_bpchw)
        assert isinstance(backbone, Backbone)
        maps_bpdhw = encode_maps(backbone, views_bpchw)
        cells = F.adaptive_avg_pool2d(maps_bpdhw.flatten(0, 1), self.cells).flatten(1)
        return cells.view(*views_bpchw.shape[:2], -1)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the cross-entropy, or the dense transform's loss, averaged over the batch and labeled crops."""
        if self.dense is not None:
            return Loss(self.dense.loss(outputs["decoded"].float(), batch.targets["transformed"]), {})
        logits_bk = outputs["logits"].float()
        label_b = batch.targets["transformed"].flatten()
        correct = (logits_bk.argmax(dim=1) == label_b).float().mean()
        return Loss(F.cross_entropy(logits_bk, label_b), {"accuracy": correct})
