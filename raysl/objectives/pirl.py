"""PIRL: make a transformed image similar to the memory of its image, and dissimilar to other images.

Misra and van der Maaten, "Self-Supervised Learning of Pretext-Invariant Representations", arXiv 1912.01991. With f
and g the heads of the image and of its transformed version, m the memory bank and v the backbone's features,

    L = lambda * NCE(m_I, g(v_It)) + (1 - lambda) * NCE(m_I, f(v_I))                                       (eq. 5)

Both terms compare with the memory and never with each other. Both use the same negatives. lambda = 0 is NPID. Let m_0
be the memory of the image, m_1 .. m_K the negatives, u_j = m_j q / tau the scores of a query q, and p = softmax(u). NCE
is one of three losses, by `--pirl.loss`:

    infonce    -log p_0
    paper_h    -log p_0 - sum over j >= 1 of log(1 - p_j)                                               (eq. 3, 4)
    nce        K + 1 binary problems; see objectives/npid.py

Read literally, equation 3 normalizes a negative by scores between memory entries, which have no gradient. Like all
published code, this module normalizes by the scores of the query.

Published with ResNet-50, 800 epochs of ImageNet and jigsaw: 63.6 % top-1 of a linear probe (NPID 59.0, prediction of
the jigsaw 45.7 %) and 57.2 % top-5 from 1 % of the labels. With 400 epochs and 4,096 negatives: jigsaw 62.2, rotation
60.2, both combined 63.1 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode_views
from raysl.fields import Bounds, Range
from raysl.objectives import Batch, Loss, MemoryBank, Setup
from raysl.objectives._heads import projection
from raysl.objectives._memory import MemoryConfig, WithMemory


@dataclass(frozen=True)
class Config(MemoryConfig):
    """Hyperparameters of PIRL.

    Args:
        lam: lambda, weight of the loss of the transformed image against that of the untransformed image, 0 to 1;
            with 0, PIRL becomes NPID (instance discrimination).
    """

    lam: Annotated[float, Bounds(0, 1), Range((0.0, 0.25, 0.5, 0.75, 1.0), mutable=True)] = 0.5


class Pirl(WithMemory):
    """Heads f and g, and the two-term loss with the memory bank."""

    invariant_views = ("image", "transformed")

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__("pirl", config, setup)
        transform = setup.transform("pirl")
        # Patches first, so that whole images update the running statistics of BatchNorm last.
        self.views = {"transformed": transform, "image": setup.identity}
        self.transformed_head = _TransformedHead(config, setup.width, transform.num_crops)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute unit embeddings (b, d): g of the transformed image, f of the image."""
        transformed_bpd, image_bpd = encode_views(backbone, [views["transformed"], views["image"]])
        transformed, image = self.transformed_head(transformed_bpd), self.image_head(image_bpd[:, 0])
        return {
            "transformed": F.normalize(transformed.float(), dim=1),
            "image": F.normalize(image.float(), dim=1),
        }

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute equation 5, averaged over the batch, with the bank as it was before this step."""
        # The transformed images come first and set z.
        queries = {name: outputs[name] for name in ("transformed", "image")}
        terms, metrics = self.contrast(queries, batch, bank)
        lam = self.config.lam
        # A term of weight 0 stays in the graph: DistributedDataParallel needs a gradient for every head.
        loss = lam * terms["transformed"] + (1 - lam) * terms["image"]
        return Loss(loss, metrics, bank_update_bd=outputs["image"].detach())


class _TransformedHead(nn.Module):
    """The head g: project every crop by the same weights, concatenate them in their order, and mix them linearly.

    With one crop (rotation) it is the projection alone (PIRL, section 3.1 and appendix A.2).
    """

    def __init__(self, config: Config, width: int, num_crops: int) -> None:
        super().__init__()
        self.project = projection(config.head, width, config.dim)
        relu = [nn.ReLU(inplace=True)] if config.head == "mlp" else []
        mix = nn.Sequential(*relu, nn.Linear(num_crops * config.dim, config.dim))
        self.mix = mix if num_crops > 1 else nn.Identity()

    def forward(self, features_bpd: Tensor) -> Tensor:
        # The crops of one image stay together.
        projected = self.project(features_bpd.flatten(0, 1)).view(len(features_bpd), -1)
        return self.mix(projected)  # type: ignore[no-any-return]
