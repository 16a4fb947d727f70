"""MoCo: a query recognises its own key among a queue of keys that a slowly moving copy of the network made.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", arXiv 1911.05722 (v1); Chen et al.,
"Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297 (v2). With q the embedding of one view, k+
the key of the other and k_j the keys in the queue,

    L = -log( exp(q k+ / tau) / (exp(q k+ / tau) + sum_j exp(q k_j / tau)) )                               (eq. 1)
    key weights <- m * key weights + (1 - m) * query weights, after every step                             (eq. 2)

v2 has the MLP head and tau = 0.2, as is the default here, with `--view.recipe mocov2`; v1 is `--moco.head linear
--moco.temperature 0.07`. Published with ResNet-50, 200 epochs of ImageNet and a queue of 65,536: v1 60.6 %, v2 67.7 %
top-1 of a linear probe; v2 with 800 epochs: 71.1 %.

Both views are ordinary ones. "moco-jigsaw" transforms the query and not the key, so that the queue holds images only;
of a transform with several crops the mean of the crops' features is taken. Keys of the query's own image that are
still in the queue do not count against it. BatchNorm would give away which key came from the same batch as the query:
as in the papers, the images of the keys are therefore dealt out anew among the workers ("shuffling BN"). On one worker
there is nothing to deal out; use `--backbone.norm group` there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl import collective
from raysl.backbone.network import encode
from raysl.contrastive import losses
from raysl.contrastive.bank import MemoryBank
from raysl.errors import UserError
from raysl.fields import Range
from raysl.objectives import Loss, Setup
from raysl.objectives._heads import HeadName, projection
from raysl.stream.reader import Batch


@dataclass(frozen=True)
class Config:
    """Hyperparameters of MoCo.

    Args:
        momentum: m, weight of the key network's old weights at every step, in 0..1; short runs want less.
        queue: K, keys that are kept, the newest of all workers (papers: 65,536).
        temperature: tau; scores are divided by it (v1: 0.07, v2: 0.2).
        dim: D, size of the embeddings.
        head: "linear" as in v1, or "mlp" with one hidden layer as in v2.
    """

    momentum: Annotated[float, Range((0.9, 0.99, 0.999))] = 0.999
    queue: Annotated[int, Range((256, 1024, 4096, 16_384, 65_536), log=True)] = 4096
    temperature: Annotated[float, Range((0.05, 0.07, 0.1, 0.2, 0.5), log=True, mutable=True)] = 0.2
    dim: int = 128
    head: HeadName = "mlp"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise UserError(
                f"moco.momentum is {self.momentum}; it must be between 0 (the key network is the query network) and "
                "1 (it never moves). The paper uses 0.999."
            )
        if not self.temperature > 0:
            raise UserError(
                f"moco.temperature is {self.temperature}; it must be more than 0 (v1 uses 0.07 and v2 0.2)."
            )
        for name, paper in (("queue", "65,536"), ("dim", "128")):
            if getattr(self, name) < 1:
                raise UserError(
                    f"moco.{name} is {getattr(self, name)}; it must be at least 1 (the paper uses {paper})."
                )


class Moco(nn.Module):
    """The query's head, the key network, and the queue."""

    predicts = False
    bank_dim = 0

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__()
        self.config = config
        self.views = {"query": setup.pretext or setup.identity, "key": setup.identity}
        self.head = projection(config.head, setup.width, config.dim)
        self.key_backbone = copy.deepcopy(setup.backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.deals = any(isinstance(module, nn.BatchNorm2d) for module in self.key_backbone.modules())
        # No buffers: DistributedDataParallel would send them at every step, and every worker has them already.
        self.queue_kd = F.normalize(torch.randn(config.queue, config.dim), dim=1)
        self.queue_indices_k = torch.full((config.queue,), -1)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unit embeddings (b, d): of the query, and of the key without gradient."""
        query_bd = self.head(encode(backbone, views["query"]).mean(dim=1))
        with torch.no_grad():
            key_bd = self._dealt(views["key"]) if self.deals else self._key(views["key"])
        return {"query": F.normalize(query_bd.float(), dim=1), "key": F.normalize(key_bd.float(), dim=1)}

    def _key(self, views_bpchw: Tensor) -> Tensor:
        embeddings_bd: Tensor = self.key_head(encode(self.key_backbone, views_bpchw)[:, 0])
        return embeddings_bd

    def _dealt(self, views_bpchw: Tensor) -> Tensor:
        """The keys, computed on other workers: of the global batch, worker r takes the images r, r + W, r + 2 W, ..."""
        rank, world = collective.rank(), collective.world()
        b = len(views_bpchw)
        keys = collective.gather(self._key(collective.gather(views_bpchw)[rank::world]))
        return keys.view(world, b, -1).transpose(0, 1).flatten(0, 1)[rank * b : (rank + 1) * b]

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Equation 1, averaged over the batch. Afterwards the keys of all workers are the newest of the queue."""
        query_bd, key_bd = outputs["query"], outputs["key"]
        indices_b = batch.indices_b.to(query_bd.device)
        queue_kd, queue_indices_k = (
            self.queue_kd.to(query_bd.device),
            self.queue_indices_k.to(query_bd.device),
        )
        cosine_b = (query_bd * key_bd).sum(dim=1)
        with torch.autocast(query_bd.device.type, enabled=False):
            cosines_bk = query_bd @ queue_kd.T
        others_bk = cosines_bk.masked_fill(indices_b[:, None] == queue_indices_k, float("-inf"))
        # In the order of the global batch, which is the same on any number of workers.
        self.queue_kd = torch.cat([collective.gather(key_bd), queue_kd])[: self.config.queue]
        self.queue_indices_k = torch.cat([collective.gather(indices_b), queue_indices_k])[: self.config.queue]
        tau = self.config.temperature
        metrics = {
            "similarity": cosine_b.detach().mean(),
            "accuracy": (cosine_b > others_bk.amax(dim=1)).float().mean(),
        }
        return Loss(losses.info_nce(cosine_b / tau, others_bk / tau).mean(), metrics)

    @torch.no_grad()
    def after_step(self, backbone: nn.Module) -> None:
        """Equation 2. The statistics of BatchNorm are the key network's own."""
        for ours, theirs in ((self.key_backbone, backbone), (self.key_head, self.head)):
            for key, query in zip(ours.parameters(), theirs.parameters(), strict=True):
                key.lerp_(query, 1 - self.config.momentum)

    def get_extra_state(self) -> dict[str, Tensor]:
        """The queue, which is saved with the network."""
        return {"queue_kd": self.queue_kd, "queue_indices_k": self.queue_indices_k}

    def set_extra_state(self, state: Any) -> None:
        """Takes the queue of a checkpoint."""
        self.queue_kd, self.queue_indices_k = state["queue_kd"], state["queue_indices_k"]
