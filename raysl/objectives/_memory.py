"""Queries against the memory of their images: what the memory-bank methods, NPID and PIRL, have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from raysl import collective
from raysl.contrastive import losses, negatives
from raysl.contrastive.bank import MemoryBank
from raysl.errors import UserError
from raysl.fields import Range
from raysl.objectives._heads import HeadName
from raysl.stream.reader import Batch


@dataclass(frozen=True)
class MemoryConfig:
    """Hyperparameters of a contrast against the memory bank.

    Args:
        temperature: tau; scores are divided by it.
        num_negatives: K for each image, below the number of images (papers: 4,096 to 32,000 of 1.28 M).
        loss: "infonce" is a softmax over the K + 1 scores; "nce" is NPID's K + 1 binary problems; "paper_h" is
            equations 3 and 4 of PIRL with one softmax.
        negatives: "shared" draws one set for the batch of a step; "own" draws for each image, as in the papers.
        dim: D, size of the embeddings.
        head: "linear" as in the papers; "mlp" with one hidden layer; "bn", linear on standardised features, which
            short runs of small backbones need.
    """

    temperature: Annotated[float, Range((0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.5), log=True, mutable=True)] = (
        0.07
    )
    num_negatives: Annotated[int, Range((64, 256, 1024, 4096), log=True)] = 4096
    loss: Literal["infonce", "nce", "paper_h"] = "infonce"
    negatives: Literal["shared", "own"] = "shared"
    dim: int = 128
    head: HeadName = "linear"

    def __post_init__(self) -> None:
        objective = type(self).__module__.rpartition(".")[2]
        if not self.temperature > 0:
            raise UserError(
                f"{objective}.temperature is {self.temperature}; it must be more than 0 (the paper uses 0.07)."
            )
        if self.dim < 1:
            raise UserError(f"{objective}.dim is {self.dim}; it must be at least 1 (the paper uses 128).")


def contrast(
    config: MemoryConfig, queries: Mapping[str, Tensor], batch: Batch, bank: MemoryBank, z: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each query against the memory of its image and the same negatives, with the bank as it was before this step.

    Args:
        queries: unit embeddings (b, d) with gradient, by name.
        z: the normalisation constant of "nce", a scalar. While it is NaN, the first of the queries sets it.

    Returns:
        The mean over the batch of the loss of each query, by its name; and metrics to log.
    """
    memory_bd = bank.lookup(batch.indices_b)
    scores_qbk = _negatives(config, torch.stack(list(queries.values())), batch, bank)
    terms: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    for (name, query_bd), scores_bk in zip(queries.items(), scores_qbk, strict=True):
        cosine_b = (query_bd * memory_bd).sum(dim=1)
        terms[name] = _term(config, cosine_b / config.temperature, scores_bk / config.temperature, bank, z)
        metrics[f"loss/{name}"] = terms[name].detach()
        metrics[f"similarity/{name}"] = cosine_b.detach().mean()
    return terms, metrics


def _negatives(config: MemoryConfig, queries_qbd: Tensor, batch: Batch, bank: MemoryBank) -> Tensor:
    """Cosine scores (q, b, k): all queries of an image meet the same negatives."""
    if config.negatives == "shared":
        return negatives.shared_scores(bank, queries_qbd, batch.rows, batch.step, config.num_negatives)
    return negatives.own_scores(bank, queries_qbd, batch.rows, config.num_negatives)


def _term(
    config: MemoryConfig, positive_b: Tensor, negatives_bk: Tensor, bank: MemoryBank, z: Tensor
) -> Tensor:
    if config.loss == "infonce":
        return losses.info_nce(positive_b, negatives_bk).mean()
    if config.loss == "paper_h":
        return losses.paper_h(positive_b, negatives_bk).mean()
    if torch.isnan(z):
        z.copy_(collective.mean(losses.estimate_z(positive_b, negatives_bk, bank.num_images)))
    return losses.nce(positive_b, negatives_bk, z, bank.num_images).mean()
