"""SwAV: predict the cluster assignment of one view from another view; clusters are learned online.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv 2006.09882. With z
the unit embedding of a view, c_k K unit prototypes, and q the code of a view,

    l(z_t, q_s) = -sum_k q_s,k log softmax(z_t c / tau)_k                                                (eq. 2)
    L = mean over the two ordinary views s and all other views t of l(z_t, q_s)                    (eq. 1 and 6)

The codes of the global batch are the assignment that maximizes the scores plus epsilon times its entropy, with all
prototypes used equally (eq. 3 to 5), by a few iterations of Sinkhorn-Knopp; they have no gradient. Published with
ResNet-50, 800 epochs of ImageNet, multi-crop of 2 and 6 crops: 75.3 % top-1 of a linear probe; 400 epochs of two crops:
70.1 %. The queue of embeddings for small batches and the frozen prototypes of the first epoch are left out.

"swav" compares two ordinary views. "swav-multi_crop" adds `crops` small views; the paper's colors are `--view.recipe
simclr`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode_views
from raysl.communication import collective
from raysl.fields import Bounds, Checked, Range
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup
from raysl.objectives._heads import mlp


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of SwAV.

    Args:
        temperature: softmax temperature tau, > 0 (paper: 0.1).
        prototypes: K, number of prototypes (paper: 3,000).
        epsilon: smoothness of the codes, > 0 (paper: 0.05).
        iterations: iterations of Sinkhorn-Knopp (paper: 3).
        crops: additional views of the method's transform, such as multi_crop (paper: 6).
        dim: D, size of the embeddings (paper: 128).
        hidden: width of the hidden layer of the projector (paper: 2,048).
    """

    temperature: Annotated[
        float, Bounds(above=0, high=100), Range((0.05, 0.1, 0.2), log=True, mutable=True)
    ] = 0.1
    prototypes: Annotated[int, Bounds(2, 1_048_576), Range((30, 100, 300, 1000, 3000), log=True)] = 300
    epsilon: Annotated[float, Bounds(above=0, high=100), Range((0.03, 0.05, 0.1), log=True)] = 0.05
    iterations: Annotated[int, Bounds(1, 1000)] = 3
    crops: Annotated[int, Bounds(1, 32)] = 4
    dim: Annotated[int, Bounds(1, 16_384)] = 128
    hidden: Annotated[int, Bounds(1, 65_536)] = 512


class Swav(Base):
    """A projector, the prototypes, and the swapped prediction of codes."""

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        small = {f"small_{i}": setup.pretext for i in range(config.crops)} if setup.pretext else {}
        # Ordinary views last: the running statistics of BatchNorm then end on whole images.
        self.views = {**small, "b": setup.identity, "a": setup.identity}
        self.projector = mlp(setup.width, config.hidden, config.dim)
        self.prototypes = nn.Linear(config.dim, config.prototypes, bias=False)
        self._normalize()

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the scores (b, v, k) of all views with the prototypes, small views first."""
        features = encode_views(backbone, [views[name] for name in self.views])
        embeddings = [F.normalize(self.projector(f.mean(dim=1)).float(), dim=1) for f in features]
        return {"scores": self.prototypes(torch.stack(embeddings, dim=1))}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the swapped prediction, averaged over pairs of views and the batch."""
        scores_bvk = outputs["scores"].float()
        log_p_bvk = F.log_softmax(scores_bvk / self.config.temperature, dim=2)
        b, v = scores_bvk.shape[:2]
        first = collective.rank() * b
        terms = []
        for s in (v - 2, v - 1):
            all_nk = collective.gather(scores_bvk[:, s])
            codes_bk = sinkhorn(all_nk, self.config.epsilon, self.config.iterations)[first : first + b]
            terms += [-(codes_bk * log_p_bvk[:, t]).sum(dim=1).mean() for t in range(v) if t != s]
        chosen_k = torch.zeros_like(scores_bvk[0, -1]).scatter_(0, scores_bvk[:, -1].argmax(dim=1), 1.0)
        return Loss(torch.stack(terms).mean(), {"used_prototypes": chosen_k.sum() / b})

    def after_step(self, backbone: nn.Module, step: int) -> None:
        """Scale the prototypes to length 1."""
        self._normalize()

    @torch.no_grad()
    def _normalize(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))


@torch.no_grad()
def sinkhorn(scores_nk: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return the codes of a batch: rows sum to 1, and all columns have nearly equal sums (eq. 5).

    Args:
        epsilon: smoothness, > 0.
    """
    # The largest score is subtracted, because exp(1 / 0.05) times a large batch may overflow.
    codes_nk = ((scores_nk - scores_nk.max()) / epsilon).exp()
    n, k = codes_nk.shape
    for _ in range(iterations):
        codes_nk = codes_nk / (codes_nk.sum(dim=0, keepdim=True) * k).clamp(min=1e-30)
        codes_nk = codes_nk / (codes_nk.sum(dim=1, keepdim=True) * n).clamp(min=1e-30)
    return codes_nk * n
