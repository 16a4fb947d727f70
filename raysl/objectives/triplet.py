"""Triplet: two views of the same thing are nearer to each other than to views of other things, by a margin.

Wang and Gupta 2015 (arXiv 1505.00687) rank patches along a track before patches of other videos. With the cosine
distance d = 1 - cos of embeddings, and all pairs of the batch,

    L = mean over n of max(0, d(x, x+) - d(x, n) + margin),

for each view x of a pair, where n are views of other pairs: all of them at first, the hardest ones (of the largest
loss) in the later part of the run. "triplet-tracking" takes the two patches of a track; any other transform, or none,
gives two views of each image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode, encode_views
from raysl.fields import Bounds, Checked, Range
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup
from raysl.objectives._heads import all_cosines, projection


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of the ranking loss.

    Args:
        margin: least difference of the distances (paper: 0.5).
        dim: D, size of the embeddings (paper: 1,024).
        hardest: number of negatives of the largest loss that count in the later part of the run (paper: 4).
        hard_from: share of the run, in 0..1, that takes all negatives before the hardest ones alone are taken.
    """

    margin: Annotated[float, Bounds(above=0, high=2), Range((0.1, 0.2, 0.5, 1.0))] = 0.5
    dim: Annotated[int, Bounds(1, 16_384)] = 128
    hardest: Annotated[int, Bounds(1, 65_536)] = 4
    hard_from: Annotated[float, Bounds(0, 1)] = 0.3


class Triplet(Base):
    """An embedding of both views, and the ranking loss between them."""

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        transform = setup.pretext or setup.identity
        # A transform of two crops is a pair by itself, as the two patches of a track.
        self.paired = transform.num_crops == 2
        # The ordinary view last: the running statistics of BatchNorm then end on whole images.
        self.views = {"pair": transform} if self.paired else {"b": transform, "a": setup.identity}
        # Without BatchNorm the embeddings of a small backbone become one point, where the loss stays at the margin.
        self.head = projection("bn", setup.width, config.dim)
        self.hard_step = round(config.hard_from * setup.num_steps)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute unit embeddings of both views, (b, 2, d)."""
        if self.paired:
            features_b2d = encode(backbone, views["pair"])
        else:
            made = encode_views(backbone, [views["b"], views["a"]])
            features_b2d = torch.stack([features.mean(dim=1) for features in made], dim=1)
        embeddings_qd = F.normalize(self.head(features_b2d.flatten(0, 1)).float(), dim=1)
        return {"embeddings": embeddings_qd.view(len(features_b2d), 2, -1)}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the ranking loss of this worker's pairs with the embeddings of all workers as negatives."""
        pairs_b2d = outputs["embeddings"]
        cosines_qk, own_qk = all_cosines(pairs_b2d, batch.indices_b)
        positive_q = (pairs_b2d[:, 0] * pairs_b2d[:, 1]).sum(dim=1).repeat_interleave(2)
        hinge_qk = F.relu(cosines_qk - positive_q[:, None] + self.config.margin).masked_fill(own_qk, 0)
        if batch.step < self.hard_step:
            ranked_q = hinge_qk.sum(dim=1) / (~own_qk).sum(dim=1).clamp(min=1)
        else:
            ranked_q = hinge_qk.topk(min(self.config.hardest, hinge_qk.shape[1]), dim=1).values.mean(dim=1)
        nearest_q = cosines_qk.masked_fill(own_qk, -2).amax(dim=1)
        metrics = {
            "similarity": positive_q.detach().mean(),
            "accuracy": (positive_q > nearest_q).float().mean(),
        }
        return Loss(ranked_q.mean(), metrics)
