"""BYOL: predict the embedding that a momentum encoder gives to another view, without negatives.

Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", arXiv 2006.07733. With q the
prediction from one view by the online network (backbone, projector, predictor) and z' the embedding of the other view
by the target network (backbone, projector), both of unit length,

    L = |q_a - z'_b|^2 + |q_b - z'_a|^2 = 4 - 2 q_a z'_b - 2 q_b z'_a                            (eq. 2, symmetrized)
    target weights <- m * target weights + (1 - m) * online weights, after every step                    (eq. 1)

with m rising from `momentum` to 1 on a cosine. Published with ResNet-50, 1,000 epochs of ImageNet: 74.3 % top-1 of a
linear probe; 300 epochs: 72.5 %. The paper's colors differ between the views: `--byol.recipe-a byol_a --byol.recipe-b
byol_b`. "byol-rotation" transforms one of the views; the features of several crops are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode_views
from raysl.fields import Bounds, Range
from raysl.objectives import Batch, Loss, MemoryBank, Setup
from raysl.objectives._heads import ema_update, frozen_copy, mlp, rising_momentum
from raysl.objectives._two_views import TwoViews, TwoViewsConfig


@dataclass(frozen=True)
class Config(TwoViewsConfig):
    """Hyperparameters of BYOL.

    Args:
        momentum: first momentum of the target network, in 0..1 (paper: 0.996, and 0.99 for 300 epochs).
        dim: D, size of the embeddings (paper: 256).
        hidden: width of the hidden layer of projector and predictor (paper: 4,096).
    """

    momentum: Annotated[float, Bounds(0, 1), Range((0.9, 0.97, 0.99, 0.996))] = 0.99
    dim: Annotated[int, Bounds(1, 16_384)] = 128
    hidden: Annotated[int, Bounds(1, 65_536)] = 512


class Byol(TwoViews):
    """Projector and predictor of the online network, and the target network."""

    moving_backbone = "target_backbone"

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        self.num_steps = setup.num_steps
        self.projector = mlp(setup.width, config.hidden, config.dim)
        self.predictor = mlp(config.dim, config.hidden, config.dim)
        self.target_backbone = frozen_copy(setup.backbone)
        self.target_projector = frozen_copy(self.projector)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute unit predictions and, without gradient, unit targets of both views, (b, 2, d)."""
        both = [views["a"], views["b"]]
        with torch.no_grad():
            targets = [self.target_projector(f.mean(dim=1)) for f in encode_views(self.target_backbone, both)]
        predictions = [self.predictor(self.projector(f.mean(dim=1))) for f in encode_views(backbone, both)]
        return {
            "predictions": F.normalize(torch.stack(predictions, dim=1).float(), dim=2),
            "targets": F.normalize(torch.stack(targets, dim=1).float(), dim=2),
        }

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute equation 2, symmetrized and averaged over the batch."""
        cosine_b2 = (outputs["predictions"] * outputs["targets"].flip(1)).sum(dim=2)
        return Loss((2 - 2 * cosine_b2).sum(dim=1).mean(), {"similarity": cosine_b2.detach().mean()})

    def after_step(self, backbone: nn.Module, step: int) -> None:
        """Move the target network: equation 1."""
        momentum = rising_momentum(self.config.momentum, step, self.num_steps)
        ema_update(self.target_backbone, backbone, momentum)
        ema_update(self.target_projector, self.projector, momentum)
