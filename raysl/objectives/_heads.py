"""Heads that several objectives share: projections and predictors from features to embeddings."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from raysl.communication import collective

HeadName = Literal["linear", "mlp", "bn"]
NormName = Literal["none", "batch", "layer"]


def projection(head: HeadName, width: int, dim: int, norm: NormName = "none") -> nn.Module:
    """Build a projection from features (b, width) to embeddings (b, dim), which are not normalized.

    Args:
        head: "linear"; "mlp" with one hidden layer as wide as the features; or "bn", linear on features that are
            standardized over the batch. A small backbone first gives all images nearly the same direction, and a short
            run with a high learning rate may never leave it. Standardized features have no such direction.
        norm: normalization of the hidden layer of an "mlp", before its ReLU.
    """
    if head == "linear":
        return nn.Linear(width, dim)
    if head == "bn":
        return nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, dim))
    layers: list[nn.Module] = [nn.Linear(width, width)]
    if norm != "none":
        layers.append(nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width))
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.Linear(width, dim))


def mlp(width: int, hidden: int, dim: int, layers: int = 2) -> nn.Sequential:
    """Build a perceptron with BatchNorm and ReLU after each of its hidden layers.

    Args:
        layers: linear layers, at least 1.
    """
    widths = [width, *[hidden] * (layers - 1)]
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        modules += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules, nn.Linear(widths[-1], dim))


def frozen_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module without gradients, such as a momentum encoder."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Move the parameters of a momentum encoder: target <- momentum * target + (1 - momentum) * online.

    BatchNorm statistics stay the target's own.
    """
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)


def rising_momentum(base: float, step: int, num_steps: int) -> float:
    """Return the momentum of a step, which rises from `base` to 1 on a cosine (Grill et al. 2020, section 3.3)."""
    return 1 - (1 - base) * (math.cos(math.pi * min(1.0, step / num_steps)) + 1) / 2


def all_cosines(pairs_b2d: Tensor, index_b: Tensor) -> tuple[Tensor, Tensor]:
    """Compare both views of this worker's images with both views of the images of all workers, with gradient.

    Args:
        pairs_b2d: unit embeddings.
        index_b: indices of the images in the data set.

    Returns:
        Cosines (2 b, k), with both views of an image together on either axis; and bool (2 b, k), True for views of the
        query's own image, of which a batch at the end of an epoch may contain a second copy.
    """
    keys_kd = collective.gather_with_gradient(pairs_b2d).flatten(0, 1)
    own_bk = index_b[:, None] == collective.gather(index_b).repeat_interleave(2)
    with torch.autocast(keys_kd.device.type, enabled=False):
        return pairs_b2d.flatten(0, 1) @ keys_kd.T, own_bk.repeat_interleave(2, dim=0)
