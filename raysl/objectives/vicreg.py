"""VICReg: make the embeddings of two views similar, with a variance and a decorrelation term against collapse.

Bardes, Ponce and LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", arXiv
2105.04906. With Z and Z' the embeddings (n, d) of two views,

    L = lambda * s(Z, Z') + mu * (v(Z) + v(Z')) / 2 + nu * (c(Z) + c(Z'))                                (eq. 6)
    s = mean squared difference of Z and Z'                                                              (eq. 5)
    v = mean over dimensions of max(0, 1 - sqrt(variance + 0.0001))                                  (eq. 1 and 2)
    c = 1/d * sum over i != j of covariance_ij^2                                                     (eq. 3 and 4)

over the global batch of all workers, with gradient. As in the authors' code, from which the weights are, s is a mean
over dimensions too and v has the factor 1/2. Published with ResNet-50, 1,000 epochs of ImageNet, batches of 2,048 and
embeddings of 8,192 dimensions: 73.2 % top-1 of a linear probe. "vicreg-rotation" transforms one of the views; the
features of several crops are averaged. The paper's colors are those of BYOL: `--vicreg.recipe-a byol_a
--vicreg.recipe-b byol_b`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.communication import collective
from raysl.fields import Bounds, Range
from raysl.objectives import Batch, Loss, MemoryBank
from raysl.objectives._two_views import Projected, ProjectedConfig

_Weight = Annotated[float, Bounds(0, 1e6), Range((1.0, 5.0, 25.0), log=True, mutable=True)]


@dataclass(frozen=True)
class Config(ProjectedConfig):
    """Hyperparameters of VICReg.

    Args:
        invariance: lambda, weight of the similarity of the views, >= 0 (paper: 25).
        variance: mu, weight of the variance term, >= 0 (paper: 25).
        covariance: nu, weight of the decorrelation term, >= 0 (paper: 1).
    """

    invariance: _Weight = 25.0
    variance: _Weight = 25.0
    covariance: _Weight = 1.0


class Vicreg(Projected):
    """A projector for two views, and the three terms of their loss."""

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute equation 6 over the global batch."""
        a_nd, b_nd = (collective.gather_with_gradient(outputs[view].float()) for view in ("a", "b"))
        invariance = F.mse_loss(a_nd, b_nd)
        variance = (_hinge(a_nd) + _hinge(b_nd)) / 2
        covariance = _off_diagonal(a_nd) + _off_diagonal(b_nd)
        config = self.config
        loss = config.invariance * invariance + config.variance * variance + config.covariance * covariance
        terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return Loss(loss, {f"loss/{name}": term.detach() for name, term in terms.items()})


def _hinge(x_nd: Tensor) -> Tensor:
    """Compute v: equations 1 and 2."""
    return F.relu(1 - (x_nd.var(dim=0) + 1e-4).sqrt()).mean()


def _off_diagonal(x_nd: Tensor) -> Tensor:
    """Compute c: equations 3 and 4."""
    centered_nd = x_nd - x_nd.mean(dim=0)
    with torch.autocast(x_nd.device.type, enabled=False):
        covariance_dd = centered_nd.T @ centered_nd / max(1, len(x_nd) - 1)
    return (covariance_dd.square().sum() - covariance_dd.diagonal().square().sum()) / x_nd.shape[1]
