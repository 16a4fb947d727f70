"""Contrast queries with the memory of their images: the part that the memory-bank methods NPID and PIRL share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from raysl.communication import collective
from raysl.contrastive import losses, negatives
from raysl.fields import Bounds, Checked, Range
from raysl.objectives import Base, Batch, MemoryBank, Setup
from raysl.objectives._heads import HeadName, projection


@dataclass(frozen=True)
class MemoryConfig(Checked):
    """Hyperparameters of a contrast with the memory bank.

    Args:
        temperature: softmax temperature tau, > 0; scores are divided by it.
        num_negatives: K, number of negatives for each image, less than the number of images (papers: 4,096 to 32,000
            for 1.28 million images).
        loss: "infonce" is a softmax over the K + 1 scores; "nce" is noise-contrastive estimation with K + 1 binary
            decisions, as in NPID; "paper_h" is the loss as equations 3 and 4 of the PIRL paper print it (h is the
            paper's letter for a probability), with probabilities from one softmax over the K + 1 scores.
        negatives: "shared" samples one set of negatives per step; "own" samples a set for each image, as the papers do.
        dim: D, number of dimensions of the embeddings.
        head: "linear" as in the papers; "mlp" with one hidden layer; "bn", linear on standardized features, which
            is recommended for short runs of small backbones.
    """

    temperature: Annotated[
        float,
        Bounds(above=0, high=100, hint="the papers use 0.07"),
        Range((0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.5), log=True, mutable=True),
    ] = 0.07
    num_negatives: Annotated[int, Bounds(1, 1_048_576), Range((64, 256, 1024, 4096), log=True)] = 4096
    loss: Literal["infonce", "nce", "paper_h"] = "infonce"
    negatives: Literal["shared", "own"] = "shared"
    dim: Annotated[int, Bounds(1, 16_384)] = 128
    head: HeadName = "linear"


class WithMemory(Base):
    """Base of an objective that contrasts queries with the memory bank: the head of the image, and the constant z.

    Raises:
        UserError: the data set has fewer other images than negatives.
    """

    z: Tensor

    def __init__(self, name: str, config: MemoryConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        negatives.check(config.num_negatives, setup.num_images, name)
        self.bank_dim = config.dim
        # The binary decisions of "nce", and the negatives of "paper_h", add the same.
        k = config.num_negatives
        self.chance = math.log1p(k) + (0.0 if config.loss == "infonce" else k * math.log1p(1 / k))
        self.image_head = projection(config.head, setup.width, config.dim)
        # The normalization constant of "nce": NaN until the first batch sets it, while the bank holds random vectors.
        # It is saved, because a later batch would give another value.
        self.register_buffer("z", torch.tensor(float("nan")))

    def contrast(
        self, queries: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Contrast each query with the memory of its image and the same negatives. The bank is not changed.

        Args:
            queries: unit embeddings (b, d) with gradient, by name. The first sets z.

        Returns:
            The loss of each query by name, averaged over the batch; and metrics to log.
        """
        assert bank is not None
        memory_bd = bank.lookup(batch.indices_b)
        # All queries of an image share their negatives.
        queries_qbd = torch.stack(list(queries.values()))
        k, tau = self.config.num_negatives, self.config.temperature
        if self.config.negatives == "shared":
            scores_qbk = negatives.shared_scores(bank, queries_qbd, batch.rows, batch.step, k)
        else:
            scores_qbk = negatives.per_image_scores(bank, queries_qbd, batch.rows, k)
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for (name, query_bd), scores_bk in zip(queries.items(), scores_qbk, strict=True):
            cosine_b = (query_bd * memory_bd).sum(dim=1)
            terms[name] = self._term(cosine_b / tau, scores_bk / tau, bank.num_images)
            metrics[f"loss/{name}"] = terms[name].detach()
            metrics[f"similarity/{name}"] = cosine_b.detach().mean()
        return terms, metrics

    def _term(self, positive_b: Tensor, negatives_bk: Tensor, num_images: int) -> Tensor:
        if self.config.loss == "infonce":
            return losses.info_nce(positive_b, negatives_bk).mean()
        if self.config.loss == "paper_h":
            return losses.paper_h(positive_b, negatives_bk).mean()
        # Without a branch: the host would wait for the device to read z.
        estimate = collective.mean(losses.estimate_z(positive_b, negatives_bk, num_images))
        self.z.copy_(torch.where(self.z.isnan(), estimate, self.z))
        return losses.nce(positive_b, negatives_bk, self.z, num_images).mean()
