"""NPID: classify every image as its own class, by its entry in a memory bank.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv 1805.01978. With f the
head, v the backbone's features of an image I and m the memory bank,

    L = NCE(m_I, f(v_I))

which is PIRL with lambda = 0 and needs no pretext transform. The default loss is the softmax over K + 1 scores. The
paper's own loss, `--npid.loss nce`, is K + 1 binary problems, with N images and q = f(v_I),

    P(j) = exp(m_j q / tau) / Z                                                              (eq. 2)
    NCE(m_I, q) = -log(P(I) / (P(I) + K/N)) - sum over negatives j of log((K/N) / (P(j) + K/N))   (eq. 7)

where the first batch sets Z once. Published with ResNet-50, 200 epochs of ImageNet and 4,096 negatives: 54.0 % top-1 of
a linear probe; with 800 epochs and 32,000 negatives, as in the PIRL paper ("NPID++"): 59.0 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode
from raysl.objectives import Batch, Loss, MemoryBank, Setup
from raysl.objectives._memory import MemoryConfig, WithMemory


@dataclass(frozen=True)
class Config(MemoryConfig):
    """Hyperparameters of NPID: those of a contrast with the memory bank."""


class Npid(WithMemory):
    """The head f, and its contrast with the memory bank."""

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__("npid", config, setup)
        setup.no_transform("npid")
        self.views = {"image": setup.identity}

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute unit embeddings (b, d)."""
        image = self.image_head(encode(backbone, views["image"])[:, 0])
        return {"image": F.normalize(image.float(), dim=1)}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the NCE, averaged over the batch, with the bank of before this step."""
        terms, metrics = self.contrast({"image": outputs["image"]}, batch, bank)
        return Loss(terms["image"], metrics, bank_update_bd=outputs["image"].detach())
