"""Negatives from the memory bank: which rows an image is pushed away from. Never its own."""

from __future__ import annotations

import torch
from torch import Tensor

from raysl import rng
from raysl.contrastive.bank import MemoryBank
from raysl.errors import UserError
from raysl.rng import ImageRng
from raysl.stream.plan import Rows


def check(num_negatives: int, num_images: int) -> None:
    """Raises UserError unless `num_negatives` other images exist."""
    if not 1 <= num_negatives < num_images:
        raise UserError(
            f"num_negatives is {num_negatives} and the data set has {num_images} images. Negatives are other images, "
            f"so there can be 1 to {num_images - 1}: set num_negatives, as --pirl.num-negatives, to one of these."
        )


def shared_scores(bank: MemoryBank, queries_bd: Tensor, rows: Rows, step: int, num_negatives: int) -> Tensor:
    """Scores against one set of negatives for the whole global batch of a step.

    A set of K + 1 distinct images is drawn from (seed, step), the same on every worker. Each query loses its own
    image from it, or the last one where its own is not in it, and so has exactly K negatives. One matrix product
    instead of gathering b * K rows; the negatives of a batch are correlated.

    Args:
        queries_bd: float (b, d) with gradient; or (q, b, d), q queries of each image, which meet the same rows.
        rows: the images of the queries.

    Returns:
        float32 (b, k + 1) or (q, b, k + 1) cosine scores, with -inf in one place of each row.
    """
    generator = rng.generator(bank.seed, "negatives", step)
    device = queries_bd.device
    drawn_k = torch.from_numpy(generator.choice(bank.num_images, num_negatives + 1, replace=False)).to(device)
    keys_kd = bank.lookup(drawn_k, shared=True)
    own_bk = drawn_k[None, :] == torch.from_numpy(rows.indices_b).to(device)[:, None]
    own_bk[:, -1] |= ~own_bk.any(dim=1)
    with torch.autocast(device.type, enabled=False):
        return (queries_bd.float() @ keys_kd.T).masked_fill(own_bk, float("-inf"))


def own_scores(bank: MemoryBank, queries_bd: Tensor, rows: Rows, num_negatives: int) -> Tensor:
    """Scores against negatives drawn for each image alone, uniformly over the others, with replacement.

    As the papers have it; needs b * K * D numbers of memory.

    Args:
        queries_bd: float (b, d) with gradient; or (q, b, d), q queries of each image, which meet the same rows.
        rows: the images of the queries.

    Returns:
        float32 (b, k) or (q, b, k) cosine scores.
    """
    image_rng = ImageRng(bank.seed, rows.epochs_b, rows.indices_b)
    drawn_bk = image_rng.integers("negatives", bank.num_images - 1, count=num_negatives)
    drawn_bk = drawn_bk + (drawn_bk >= torch.from_numpy(rows.indices_b)[:, None]).long()
    keys_bkd = bank.lookup(drawn_bk.flatten()).view(*drawn_bk.shape, bank.dim)
    with torch.autocast(queries_bd.device.type, enabled=False):
        return torch.einsum("...bd,bkd->...bk", queries_bd.float(), keys_bkd)
