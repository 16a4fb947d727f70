"""Equations of contrast: pure functions of scores, with no state, no ranks and no randomness.

All take the scores of a query against its positive and its negatives, already divided by the temperature:

    positive_b      float (b,)
    negatives_bk    float (b, k); a score of -inf is a negative that is not there

and return one loss for each query, (b,). They compute in float32, since exp(1 / 0.07) does not fit half precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(positive_b: Tensor, negatives_bk: Tensor) -> Tensor:
    """-log softmax of the positive among the positive and the negatives (van den Oord et al. 2018, eq. 4)."""
    logits = torch.cat([positive_b[:, None], negatives_bk], dim=1).float()
    return torch.logsumexp(logits, dim=1) - logits[:, 0]


def paper_h(positive_b: Tensor, negatives_bk: Tensor) -> Tensor:
    """Equations 3 and 4 of PIRL (Misra and van der Maaten 2019) with one softmax over the query's scores.

    -log p_0 - sum_j log(1 - p_j). Read to the letter, equation 3 would normalise the negatives' terms over scores
    between memory rows, which carry no gradient; no published code does that.
    """
    logits = torch.cat([positive_b[:, None], negatives_bk], dim=1).float()
    log_p = F.log_softmax(logits, dim=1)
    # The largest p rounds to 1 where one score stands out, and its 1 - p is summed from the others instead.
    top_b1 = logits.argmax(dim=1, keepdim=True)
    others_b1 = torch.logsumexp(log_p.scatter(1, top_b1, float("-inf")), dim=1, keepdim=True)
    log_rest = torch.log1p(-log_p.exp().scatter(1, top_b1, 0.0)).scatter(1, top_b1, others_b1)
    return -log_p[:, 0] - log_rest[:, 1:].sum(dim=1)


def nce(positive_b: Tensor, negatives_bk: Tensor, z: Tensor, num_images: int) -> Tensor:
    """Noise-contrastive estimation as in NPID (Wu et al. 2018, eq. 7): K + 1 binary problems.

    Args:
        z: the normalisation constant, see `estimate_z`; a scalar.
        num_images: N; the noise is uniform over the data set, Pn = 1 / N.

    With P = exp(score) / z, the loss is -log P0 / (P0 + K Pn) - sum over negatives of log K Pn / (Pj + K Pn): a sum
    over the negatives and not a mean, which would weaken the repulsion K times.
    """
    noise = torch.isfinite(negatives_bk).sum(dim=1).float() / num_images
    log_noise = noise.log() + z.float().log()
    attract = F.softplus(log_noise - positive_b.float())
    repel = F.softplus(negatives_bk.float() - log_noise[:, None]).sum(dim=1)
    return attract + repel


def estimate_z(positive_b: Tensor, negatives_bk: Tensor, num_images: int) -> Tensor:
    """The normalisation constant of `nce` from one batch: the mean of exp(score), times N; a scalar (Wu et al. 2018).

    At the start, with unit vectors of D dimensions in a bank of noise, z / N is about exp(1 / (2 D tau^2)).
    """
    scores = torch.cat([positive_b[:, None], negatives_bk], dim=1).float()
    return scores.exp().sum() / torch.isfinite(scores).sum() * num_images
