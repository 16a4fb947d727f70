"""Barlow Twins: make the cross-correlation matrix between the embeddings of two views the identity.

Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", arXiv 2103.03230. With z_a and z_b
the embeddings of two views, each dimension standardized over the batch,

    C_ij = mean over the batch of z_a,i z_b,j
    L = sum_i (1 - C_ii)^2 + lambda * sum_(i != j) C_ij^2                                                (eq. 1)

over the global batch of all workers, with gradient. Published with ResNet-50, 1,000 epochs of ImageNet, batches of
2,048 and embeddings of 8,192 dimensions: 73.2 % top-1 of a linear probe. The authors' code multiplies the loss by 0.024
for its learning rate; here the learning rate does. "barlow_twins-rotation" transforms one of the views; the features of
several crops are averaged. The paper's colors are those of BYOL: `--barlow-twins.recipe-a byol_a
--barlow-twins.recipe-b byol_b`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from raysl.communication import collective
from raysl.fields import Bounds, Range
from raysl.objectives import Batch, Loss, MemoryBank
from raysl.objectives._two_views import Projected, ProjectedConfig


@dataclass(frozen=True)
class Config(ProjectedConfig):
    """Hyperparameters of Barlow Twins.

    Args:
        lam: lambda, weight of the redundancy reduction, >= 0 (paper: 0.005).
    """

    lam: Annotated[float, Bounds(0, 1000), Range((0.001, 0.005, 0.02), log=True, mutable=True)] = 0.005


class BarlowTwins(Projected):
    """A projector for two views, and the loss of their cross-correlation."""

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute equation 1 over the global batch."""
        a_nd, b_nd = (
            standardized(collective.gather_with_gradient(outputs[view].float())) for view in ("a", "b")
        )
        with torch.autocast(a_nd.device.type, enabled=False):
            c_dd = a_nd.T @ b_nd / len(a_nd)
        diagonal = c_dd.diagonal()
        invariance = (1 - diagonal).square().sum()
        redundancy = c_dd.square().sum() - diagonal.square().sum()
        metrics = {"loss/invariance": invariance.detach(), "loss/redundancy": redundancy.detach()}
        return Loss(invariance + self.config.lam * redundancy, metrics)


def standardized(x_nd: Tensor) -> Tensor:
    """Return every column with mean 0 and variance 1 over the rows."""
    centered_nd = x_nd - x_nd.mean(dim=0)
    return centered_nd / (centered_nd.square().mean(dim=0) + 1e-5).sqrt()
