"""Projections from features to embeddings, that several objectives share."""

from __future__ import annotations

from typing import Literal

from torch import nn

HeadName = Literal["linear", "mlp", "bn"]
NormName = Literal["none", "batch", "layer"]


def projection(head: HeadName, width: int, dim: int, norm: NormName = "none") -> nn.Module:
    """Features (b, width) to embeddings (b, dim), not normalised.

    Args:
        head: "linear"; "mlp" with one hidden layer as wide as the features; or "bn", linear on features that are
            standardised over the batch. A small backbone gives all images nearly one direction at first, and a short
            run with a high learning rate may never leave it; standardising takes that direction away.
        norm: of the hidden layer of an "mlp", before its ReLU.
    """
    if head == "linear":
        return nn.Linear(width, dim)
    if head == "bn":
        return nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, dim))
    layers: list[nn.Module] = [nn.Linear(width, width)]
    if norm != "none":
        layers.append(nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width))
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.Linear(width, dim))
