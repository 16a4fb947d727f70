"""Contrastive losses: pure functions of scores, without state, communication or random numbers.

All take the scores of a query with its positive and its negatives, divided by the temperature:

    positive_b      float (b,)
    negatives_bk    float (b, k); a score of -inf marks a missing negative

and return one loss per query, (b,). They compute in float32, because exp(1 / 0.07) overflows half precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(positive_b: Tensor, negatives_bk: Tensor) -> Tensor:
    """Compute -log softmax of the positive among positive and negatives (van den Oord et al. 2018, eq. 4)."""
    logits = torch.cat([positive_b[:, None], negatives_bk], dim=1).float()
    return torch.logsumexp(logits, dim=1) - logits[:, 0]


def paper_h(positive_b: Tensor, negatives_bk: Tensor) -> Tensor:
    """Compute -log p_0 - sum_j log(1 - p_j): equations 3 and 4 of PIRL (Misra and van der Maaten 2019).

    p is the softmax over the scores of the query. Read literally, equation 3 normalizes the terms of the negatives by
    scores between memory rows, which have no gradient; no published code does so.
    """
    logits = torch.cat([positive_b[:, None], negatives_bk], dim=1).float()
    log_p = F.log_softmax(logits, dim=1)
    # The largest p may round to 1, so its 1 - p is the sum of the others.
    top_b1 = logits.argmax(dim=1, keepdim=True)
    others_b1 = torch.logsumexp(log_p.scatter(1, top_b1, float("-inf")), dim=1, keepdim=True)
    log_rest = torch.log1p(-log_p.exp().scatter(1, top_b1, 0.0)).scatter(1, top_b1, others_b1)
    return -log_p[:, 0] - log_rest[:, 1:].sum(dim=1)


def nce(positive_b: Tensor, negatives_bk: Tensor, z: Tensor, num_images: int) -> Tensor:
    """Compute the noise-contrastive estimation of NPID (Wu et al. 2018, eq. 7): K + 1 binary problems.

    Args:
        z: the normalization constant, a scalar; see `estimate_z`.
        num_images: N. The noise is uniform over the data set, Pn = 1 / N.

    With P = exp(score) / z, the loss is -log P0 / (P0 + K Pn) - sum over negatives of log K Pn / (Pj + K Pn). A mean
    over the negatives would weaken the repulsion by a factor of K.
    """
    noise = torch.isfinite(negatives_bk).sum(dim=1).float() / num_images
    log_noise = noise.log() + z.float().log()
    attract = F.softplus(log_noise - positive_b.float())
    repel = F.softplus(negatives_bk.float() - log_noise[:, None]).sum(dim=1)
    return attract + repel


def estimate_z(positive_b: Tensor, negatives_bk: Tensor, num_images: int) -> Tensor:
    """Estimate the normalization constant of `nce` from a batch: N times the mean of exp(score) (Wu et al. 2018).

    With random unit vectors of D dimensions, as at the start, z / N is about exp(1 / (2 D tau^2)).
    """
    scores = torch.cat([positive_b[:, None], negatives_bk], dim=1).float()
    return scores.exp().sum() / torch.isfinite(scores).sum() * num_images
