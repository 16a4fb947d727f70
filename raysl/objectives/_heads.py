"""Projections from features to embeddings, that several objectives share."""

from __future__ import annotations

from typing import Literal

from torch import nn

HeadName = Literal["linear", "mlp"]
NormName = Literal["none", "batch", "layer"]


def projection(head: HeadName, width: int, dim: int, norm: NormName = "none") -> nn.Module:
    """Features (b, width) to embeddings (b, dim), not normalised.

    Args:
        head: "linear", or "mlp" with one hidden layer as wide as the features.
        norm: of the hidden layer of an "mlp", before its ReLU.
    """
    if head == "linear":
        return nn.Linear(width, dim)
    layers: list[nn.Module] = [nn.Linear(width, width)]
    if norm != "none":
        layers.append(nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width))
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.Linear(width, dim))
