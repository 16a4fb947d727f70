"""Sample negatives from the memory bank: rows of other images."""

from __future__ import annotations

import torch
from torch import Tensor

from raysl import rng
from raysl.communication.device_copy import to_device
from raysl.contrastive.bank import MemoryBank
from raysl.dataset import Rows
from raysl.errors import UserError, counted
from raysl.rng import ImageRng


def check(num_negatives: int, num_images: int, objective: str) -> None:
    """Raise UserError, with the flag of the objective, unless the data set has `num_negatives` other images."""
    if not 1 <= num_negatives < num_images:
        raise UserError(
            f"--{objective}.num-negatives is {num_negatives} and the data set has {counted(num_images, 'image')}. "
            f"Negatives are other images, so there can be 1 to {num_images - 1}."
        )


def shared_scores(bank: MemoryBank, queries_bd: Tensor, rows: Rows, step: int, num_negatives: int) -> Tensor:
    """Compute scores with one set of negatives for the whole global batch of a step.

    K + 1 distinct images are sampled from (seed, step), equal on every worker. Each query leaves out its own image, or
    the last image if its own is not among them, and so has exactly K negatives. This takes one matrix product and
    gathers no b * K rows, but the negatives of a batch are correlated.

    Args:
        queries_bd: float (b, d) with gradient; or (q, b, d) for q queries per image, which share the negatives.
        num_negatives: K.

    Returns:
        float32 (b, k + 1) or (q, b, k + 1) cosine scores, with one -inf per row.
    """
    generator = rng.generator(bank.seed, "negatives", step)
    device = queries_bd.device
    drawn_k = to_device(generator.choice(bank.num_images, num_negatives + 1, replace=False), device)
    keys_kd = bank.lookup(drawn_k, shared=True)
    own_bk = drawn_k[None, :] == to_device(rows.indices_b, device)[:, None]
    own_bk[:, -1] |= ~own_bk.any(dim=1)
    with torch.autocast(device.type, enabled=False):
        return (queries_bd.float() @ keys_kd.T).masked_fill(own_bk, float("-inf"))


def per_image_scores(bank: MemoryBank, queries_bd: Tensor, rows: Rows, num_negatives: int) -> Tensor:
    """Compute scores with separate negatives for each image, uniform over the other images, with replacement.

    As in the papers. Needs memory for b * K * D numbers.

    Args:
        queries_bd: float (b, d) with gradient; or (q, b, d) for q queries per image, which share the negatives.
        num_negatives: K.

    Returns:
        float32 (b, k) or (q, b, k) cosine scores.
    """
    device = queries_bd.device
    image_rng = ImageRng(bank.seed, rows.epochs_b, rows.indices_b, device=device)
    drawn_bk = image_rng.integers("negatives", bank.num_images - 1, count=num_negatives)
    drawn_bk = drawn_bk + (drawn_bk >= to_device(rows.indices_b, device)[:, None]).long()
    keys_bkd = bank.lookup(drawn_bk.flatten()).view(*drawn_bk.shape, bank.dim)
    with torch.autocast(device.type, enabled=False):
        return torch.einsum("...bd,bkd->...bk", queries_bd.float(), keys_bkd)
