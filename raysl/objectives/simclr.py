"""SimCLR: two views of an image recognize each other among all other views of the batch.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709. With z_a and
z_b the unit embeddings of the two views of an image, each view is a query (NT-Xent, eq. 1):

    L = mean over queries of -log( exp(z_a z_b / tau) / (exp(z_a z_b / tau) + sum over others exp(z_a z_o / tau)) )

where the others are both views of every other image in the global batch, on all workers, with gradient. A second copy
of the image, which a batch at the end of an epoch may contain, is left out. With ResNet-50, batches of 4,096 and LARS,
VISSL reports 64.4, 66.6, 67.7 and 69.7 % top-1 of a linear probe after 100, 200, 400 and 800 epochs of ImageNet.

Both views are ordinary views. "simclr-rotation" transforms one of them. The features of several crops, as of jigsaw,
are averaged: one head serves both views and does not see the order of the crops. The paper's colors are `--view.recipe
simclr`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode_views
from raysl.contrastive import losses
from raysl.fields import Bounds, Checked, Range
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup
from raysl.objectives._heads import HeadName, NormName, all_cosines, projection


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of SimCLR.

    Args:
        temperature: softmax temperature tau, > 0 (paper: 0.1 for ImageNet, 0.5 for CIFAR-10).
        dim: D, size of the embeddings.
        head: "mlp" with one hidden layer as in the paper, or "linear".
        norm: normalization of the hidden layer. "batch", as in the paper, normalizes over the images of one worker, so
            that gradients depend on the number of workers; "none" and "layer" do not.
    """

    temperature: Annotated[
        float,
        Bounds(above=0, high=100, hint="the paper uses 0.1"),
        Range((0.05, 0.1, 0.2, 0.5, 1.0), log=True, mutable=True),
    ] = 0.1
    dim: Annotated[int, Bounds(1, 16_384)] = 128
    head: HeadName = "mlp"
    norm: NormName = "none"


class Simclr(Base):
    """One head for two views, and the loss between them."""

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        # The ordinary view last: the running statistics of BatchNorm then end on whole images.
        self.views = {"b": setup.pretext or setup.identity, "a": setup.identity}
        self.head = projection(config.head, setup.width, config.dim, config.norm)
        self.chance = math.log(2 * setup.batch_size - 1)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute unit embeddings of both views, (b, 2, d)."""
        features_bpd = encode_views(backbone, [views["b"], views["a"]])
        features_b2d = torch.stack([features.mean(dim=1) for features in features_bpd], dim=1)
        embeddings = self.head(features_b2d.flatten(0, 1)).view(len(features_b2d), 2, -1)
        return {"embeddings": F.normalize(embeddings.float(), dim=2)}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute NT-Xent of this worker's queries with the embeddings of all workers, averaged over both views."""
        pairs_b2d = outputs["embeddings"]
        cosine_b = (pairs_b2d[:, 0] * pairs_b2d[:, 1]).sum(dim=1)
        cosines_qk, own_qk = all_cosines(pairs_b2d, batch.indices_b)
        others_qk = cosines_qk.masked_fill(own_qk, float("-inf"))
        positive_q = cosine_b.repeat_interleave(2)
        tau = self.config.temperature
        metrics = {
            "similarity": cosine_b.detach().mean(),
            "accuracy": (positive_q > others_qk.amax(dim=1)).float().mean(),
        }
        return Loss(losses.info_nce(positive_q / tau, others_qk / tau).mean(), metrics)
