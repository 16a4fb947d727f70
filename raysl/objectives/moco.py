"""MoCo: a query recognizes its own key in a queue of keys, which a momentum encoder computes.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", arXiv 1911.05722 (v1); Chen et al.,
"Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297 (v2). With q the embedding of one view, k+
the key of the other and k_j the keys in the queue,

    L = -log( exp(q k+ / tau) / (exp(q k+ / tau) + sum_j exp(q k_j / tau)) )                               (eq. 1)
    key weights <- m * key weights + (1 - m) * query weights, after every step                             (eq. 2)

The defaults are those of v2, with the MLP head and tau = 0.2; its colors are `--view.recipe mocov2`. v1 is `--moco.head
linear --moco.temperature 0.07`. Published with ResNet-50, 200 epochs of ImageNet and a queue of 65,536: v1 60.6 %, v2
67.7 % top-1 of a linear probe; v2 with 800 epochs: 71.1 %.

Both views are ordinary views. "moco-jigsaw" transforms the query and not the key, so that the queue contains whole
images; the features of several crops are averaged. Older keys of the query's own image in the queue are no negatives.
BatchNorm would leak which key shares a batch with the query, so the images of the keys are shuffled among the workers,
as in the papers ("shuffling BN"). With one worker this does nothing; use `--backbone.norm group` there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode
from raysl.communication import collective
from raysl.contrastive import losses
from raysl.fields import Bounds, Checked, Range
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup
from raysl.objectives._heads import HeadName, ema_update, frozen_copy, projection


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of MoCo.

    Args:
        momentum: m, momentum of the key network, in 0..1 (papers: 0.999); short runs need less.
        queue: K, number of keys that are kept, the newest of all workers (papers: 65,536).
        temperature: softmax temperature tau, > 0 (v1: 0.07, v2: 0.2).
        dim: D, size of the embeddings.
        head: "linear" as in v1, or "mlp" with one hidden layer as in v2.
    """

    momentum: Annotated[float, Bounds(0, 1, hint="the paper uses 0.999"), Range((0.9, 0.99, 0.999))] = 0.999
    queue: Annotated[int, Bounds(1, 4_194_304), Range((256, 1024, 4096, 16_384, 65_536), log=True)] = 4096
    temperature: Annotated[
        float,
        Bounds(above=0, high=100, hint="v1 uses 0.07 and v2 0.2"),
        Range((0.05, 0.07, 0.1, 0.2, 0.5), log=True, mutable=True),
    ] = 0.2
    dim: Annotated[int, Bounds(1, 16_384)] = 128
    head: HeadName = "mlp"


class Moco(Base):
    """The head of the query, the key network, and the queue."""

    moving_backbone = "key_backbone"

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        self.views = {"query": setup.pretext or setup.identity, "key": setup.identity}
        self.head = projection(config.head, setup.width, config.dim)
        self.chance = math.log1p(config.queue)
        self.key_backbone = frozen_copy(setup.backbone)
        self.key_head = frozen_copy(self.head)
        self.shuffles = any(isinstance(module, nn.BatchNorm2d) for module in self.key_backbone.modules())
        # No buffers: DistributedDataParallel would broadcast them at every step, and every worker has them.
        self.queue_kd = F.normalize(torch.randn(config.queue, config.dim), dim=1)
        self.queue_indices_k = torch.full((config.queue,), -1)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute unit embeddings (b, d) of the query, and of the key without gradient."""
        query_bd = self.head(encode(backbone, views["query"]).mean(dim=1))
        with torch.no_grad():
            key_bd = self._shuffled(views["key"]) if self.shuffles else self._key(views["key"])
        return {"query": F.normalize(query_bd.float(), dim=1), "key": F.normalize(key_bd.float(), dim=1)}

    def _key(self, views_bpchw: Tensor) -> Tensor:
        embeddings_bd: Tensor = self.key_head(encode(self.key_backbone, views_bpchw)[:, 0])
        return embeddings_bd

    def _shuffled(self, views_bpchw: Tensor) -> Tensor:
        """Compute the keys on other workers: worker r takes the images r, r + W, r + 2 W, ... of the global batch."""
        rank, world = collective.rank(), collective.world()
        b = len(views_bpchw)
        keys = collective.gather(self._key(collective.gather(views_bpchw)[rank::world]))
        return keys.view(world, b, -1).transpose(0, 1).flatten(0, 1)[rank * b : (rank + 1) * b]

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute equation 1, averaged over the batch. Then put the keys of all workers into the queue."""
        query_bd, key_bd = outputs["query"], outputs["key"]
        indices_b = batch.indices_b
        device = query_bd.device
        queue_kd, queue_indices_k = self.queue_kd.to(device), self.queue_indices_k.to(device)
        cosine_b = (query_bd * key_bd).sum(dim=1)
        with torch.autocast(query_bd.device.type, enabled=False):
            cosines_bk = query_bd @ queue_kd.T
        others_bk = cosines_bk.masked_fill(indices_b[:, None] == queue_indices_k, float("-inf"))
        # The order of the global batch is the same on any number of workers.
        self.queue_kd = torch.cat([collective.gather(key_bd), queue_kd])[: self.config.queue]
        self.queue_indices_k = torch.cat([collective.gather(indices_b), queue_indices_k])[: self.config.queue]
        tau = self.config.temperature
        metrics = {
            "similarity": cosine_b.detach().mean(),
            "accuracy": (cosine_b > others_bk.amax(dim=1)).float().mean(),
        }
        return Loss(losses.info_nce(cosine_b / tau, others_bk / tau).mean(), metrics)

    def after_step(self, backbone: nn.Module, step: int) -> None:
        """Move the key network: equation 2."""
        ema_update(self.key_backbone, backbone, self.config.momentum)
        ema_update(self.key_head, self.head, self.config.momentum)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the queue, which is saved with the network."""
        return {"queue_kd": self.queue_kd, "queue_indices_k": self.queue_indices_k}

    def set_extra_state(self, state: Any) -> None:
        """Restore the queue from a checkpoint."""
        self.queue_kd, self.queue_indices_k = state["queue_kd"], state["queue_indices_k"]
