"""PIRL: pull the transformed image to the memory of the image, and push other images away.

Misra and van der Maaten, "Self-Supervised Learning of Pretext-Invariant Representations", arXiv 1912.01991. With f
and g the heads of the image and of its transformed version, m the memory bank and v the trunk's features,

    L = lambda * NCE(m_I, g(v_It)) + (1 - lambda) * NCE(m_I, f(v_I))                                       (eq. 5)

Both terms meet the memory and never each other. lambda = 0 is NPID. Published with ResNet-50, 800 epochs of ImageNet
and jigsaw: 63.6 % top-1 of a linear probe; 57.2 % top-5 from 1 % of the labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from raysl import collective, losses, negatives
from raysl.bank import MemoryBank
from raysl.errors import UserError
from raysl.objectives import Loss, Setup
from raysl.stream.reader import Batch
from raysl.trunk import encode


@dataclass(frozen=True)
class Config:
    """Dials of PIRL.

    Args:
        lam: lambda, weight of the transformed image's term, in 0..1.
        temperature: tau; scores are divided by it.
        num_negatives: K for each image, below the number of images (paper: 32,000 of 1.28 M; 4,096 in its analysis).
        loss: "infonce" is a softmax over the K + 1 scores; "nce" is NPID's K + 1 binary problems; "paper_h" is the
            paper's equations 3 and 4 with one softmax.
        negatives: "shared" draws one set for the batch of a step; "own" draws for each image, as in the paper.
        dim: D, size of the embeddings.
        head: "linear" as in the paper, or "mlp" with one hidden layer.
    """

    lam: Annotated[float, tyro.conf.arg(name="lambda")] = 0.5
    temperature: float = 0.07
    num_negatives: int = 4096
    loss: Literal["infonce", "nce", "paper_h"] = "infonce"
    negatives: Literal["shared", "own"] = "shared"
    dim: int = 128
    head: Literal["linear", "mlp"] = "linear"

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise UserError(
                f"pirl.lambda is {self.lam}; it must be between 0 (NPID) and 1 (only the transform)."
            )
        if not self.temperature > 0:
            raise UserError(
                f"pirl.temperature is {self.temperature}; it must be more than 0 (the paper uses 0.07)."
            )
        if self.dim < 1:
            raise UserError(f"pirl.dim is {self.dim}; it must be at least 1 (the paper uses 128).")


class Pirl(nn.Module):
    """Heads f and g, and the two-term loss against the memory bank."""

    predicts = False
    z: Tensor

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__()
        negatives.check(config.num_negatives, setup.num_images)
        transform = setup.transform("pirl")
        self.config = config
        self.num_images = setup.num_images
        self.bank_dim = config.dim
        # The patches go first: the running statistics of BatchNorm then end on whole images.
        self.views = {"transformed": transform, "image": setup.identity}
        self.image_head = _head(config, setup.width, config.dim)
        self.transformed_head = _TransformedHead(config, setup.width, transform.num_crops)
        # NaN until the first batch sets it; saved with the run, since a later bank is no longer noise.
        self.register_buffer("z", torch.tensor(float("nan")))

    def forward(self, trunk: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unit embeddings (b, d): g of the transformed image, f of the image."""
        transformed = self.transformed_head(encode(trunk, views["transformed"]))
        image = self.image_head(encode(trunk, views["image"])[:, 0])
        return {
            "transformed": F.normalize(transformed.float(), dim=1),
            "image": F.normalize(image.float(), dim=1),
        }

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Equation 5, averaged over the batch. Both terms see the bank as it was before this step."""
        assert bank is not None
        memory_bd = bank.lookup(batch.indices_b)
        # The transformed images come first and so set z.
        queries = {name: outputs[name] for name in ("transformed", "image")}
        scores_qbk = self._negatives(torch.stack(list(queries.values())), batch, bank)
        terms = {
            name: self._contrast((query * memory_bd).sum(dim=1), scores_bk)
            for (name, query), scores_bk in zip(queries.items(), scores_qbk, strict=True)
        }
        lam = self.config.lam
        # A term of weight 0 stays in the graph, so that every head has a gradient under DistributedDataParallel.
        loss = lam * terms["transformed"] + (1 - lam) * terms["image"]
        metrics = {f"loss/{name}": term.detach() for name, term in terms.items()}
        for name, query in queries.items():
            metrics[f"similarity/{name}"] = (query.detach() * memory_bd).sum(dim=1).mean()
        return Loss(loss, metrics, remember_bd=outputs["image"].detach())

    def _negatives(self, queries_qbd: Tensor, batch: Batch, bank: MemoryBank) -> Tensor:
        """Cosine scores (q, b, k): both terms of an image meet the same negatives."""
        count = self.config.num_negatives
        if self.config.negatives == "shared":
            return negatives.shared_scores(bank, queries_qbd, batch.rows, batch.step, count)
        return negatives.own_scores(bank, queries_qbd, batch.rows, count)

    def _contrast(self, cosine_b: Tensor, cosines_bk: Tensor) -> Tensor:
        """The mean over the batch of one NCE term of equation 5."""
        positive_b = cosine_b / self.config.temperature
        negatives_bk = cosines_bk / self.config.temperature
        if self.config.loss == "infonce":
            return losses.info_nce(positive_b, negatives_bk).mean()
        if self.config.loss == "paper_h":
            return losses.paper_h(positive_b, negatives_bk).mean()
        if torch.isnan(self.z):
            self.z.copy_(collective.mean(losses.estimate_z(positive_b, negatives_bk, self.num_images)))
        return losses.nce(positive_b, negatives_bk, self.z, self.num_images).mean()


def _head(config: Config, width_in: int, width_out: int) -> nn.Module:
    if config.head == "linear":
        return nn.Linear(width_in, width_out)
    return nn.Sequential(nn.Linear(width_in, width_in), nn.ReLU(inplace=True), nn.Linear(width_in, width_out))


class _TransformedHead(nn.Module):
    """g: each crop through a projection of its own weights, concatenated in the order they came, and mixed. With one
    crop (rotation) it is the projection alone (PIRL, section 3.1 and appendix A.2)."""

    def __init__(self, config: Config, width: int, num_crops: int) -> None:
        super().__init__()
        self.project = _head(config, width, config.dim)
        relu = [nn.ReLU(inplace=True)] if config.head == "mlp" else []
        mix = nn.Sequential(*relu, nn.Linear(num_crops * config.dim, config.dim))
        self.mix = mix if num_crops > 1 else nn.Identity()

    def forward(self, features_bpd: Tensor) -> Tensor:
        # Sample-major: the crops of one image stay together.
        return self.mix(self.project(features_bpd).flatten(1))  # type: ignore[no-any-return]
