"""Uniformity: an objective of your own in one file, here alignment and uniformity on the hypersphere.

Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere",
arXiv 2005.10242. With unit embeddings a and b of two views of an image, and N images in this worker's batch,

    L = mean |a - b|^2 + weight * log mean exp(-2 |x - y|^2),  over pairs x != y of embeddings of one view

    raysl pretrain --data DATA --run RUN --plugin examples/uniformity.py --method uniformity --uniformity.weight 1

The method, the class and the flags have the name of the file. `raysl/objectives/__init__.py` lists what
else an objective may have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode_views
from raysl.contrastive.bank import MemoryBank
from raysl.fields import Bounds, Checked
from raysl.objectives import Base, Loss, Setup
from raysl.stream.reader import Batch


# The fields become flags, and a sweep may vary them.
@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of alignment and uniformity.

    Args:
        dim: D, size of the embeddings (paper: 128).
        weight: weight of uniformity (paper: 1).
    """

    dim: Annotated[int, Bounds(1, 16_384)] = 128
    weight: Annotated[float, Bounds(0, 1000)] = 1.0


class Uniformity(Base):
    """A projection of the backbone's features, and the loss of two views."""

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        # The transform of "uniformity-TRANSFORM" makes the first view; without one, both are random crops.
        self.views = {"a": setup.pretext or setup.identity, "b": setup.identity}
        self.project = nn.Linear(setup.width, config.dim)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute unit embeddings (b, d) of views of uint8 (b, p, c, h, w): p crops of an image count as their mean."""
        features = encode_views(backbone, [views["a"], views["b"]])  # (b, p, width) each
        a_bd, b_bd = (F.normalize(self.project(f_bpd.mean(dim=1)).float()) for f_bpd in features)
        return {"a": a_bd, "b": b_bd}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the loss of this worker's images. Metrics are logged beside it."""
        a_bd, b_bd = outputs["a"], outputs["b"]
        alignment = (a_bd - b_bd).square().sum(dim=1).mean()
        uniformity = (_uniformity(a_bd) + _uniformity(b_bd)) / 2
        metrics = {"alignment": alignment.detach(), "uniformity": uniformity.detach()}
        return Loss(alignment + self.config.weight * uniformity, metrics)


def _uniformity(x_bd: Tensor) -> Tensor:
    distance_bb = 2 - 2 * x_bd @ x_bd.T
    others = ~distance_bb.new_ones(distance_bb.shape).tril(0).bool()  # each pair once
    return distance_bb[others].mul(-2).exp().mean().log()
