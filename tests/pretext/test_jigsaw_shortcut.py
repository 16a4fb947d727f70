"""No way to the jigsaw's label but through what the patches show: not by their edges.

On textures finer than the gap, so that only an edge which runs on from patch to patch could tell neighbors.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.pretext import Geometry
from raysl.pretext.jigsaw import Config, Jigsaw
from raysl.rng import ImageRng

IMAGES, TRAINED = 1200, 600


def textures(side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = [
        F.interpolate(torch.randn(IMAGES, 1, n, n, generator=generator), (side, side), mode="bicubic")
        for n in (24, 48)
    ]
    gray = (128 + 40 * sum(noise, torch.zeros(()))).clamp(0, 255).to(torch.uint8)
    return gray.expand(-1, 3, -1, -1).contiguous()


def edge_pixels(crops_bpchw: Tensor) -> Tensor:
    """What a linear classifier sees of the patches when it sees their outermost pixels."""
    x = crops_bpchw[:, :, 0].float()
    return torch.cat([x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1]], dim=2).flatten(1)


def seams(crops_bpchw: Tensor) -> Tensor:
    """How much the facing edges of every two slots differ, were one right of, or below, the other."""
    x = crops_bpchw[:, :, 0].float()
    beside = (x[:, :, None, :, -1] - x[:, None, :, :, 0]).abs().mean(3)
    below = (x[:, :, None, -1] - x[:, None, :, 0]).abs().mean(3)
    return torch.cat([beside, below], dim=1).flatten(1)


def accuracy(features_bd: Tensor, label_b: Tensor, labels: int) -> float:
    """Of a linear classifier (ridge regression) on images that it was not fitted to."""
    x = (features_bd - features_bd[:TRAINED].mean(0)) / features_bd[:TRAINED].std(0).clamp(min=1e-3)
    y = F.one_hot(label_b, labels).float()
    kernel = x @ x[:TRAINED].T / x.shape[1]
    fitted = torch.linalg.solve(kernel[:TRAINED] + 0.1 * torch.eye(TRAINED), y[:TRAINED] - 1 / labels)
    guess_b = (kernel[TRAINED:] @ fitted).argmax(1)
    return float((guess_b == label_b[TRAINED:]).float().mean())


def crops_and_labels(config: Config) -> tuple[Tensor, Tensor]:
    made = Jigsaw(config, Geometry(96, predicted=True))
    result = made.transform(
        textures(made.source.size), ImageRng(0, np.zeros(IMAGES, np.int64), np.arange(IMAGES))
    )
    assert result.target is not None
    return result.crops_bpchw, result.target


@pytest.mark.parametrize("labels", [2, 4])
def test_the_edges_of_the_patches_do_not_tell_their_order(labels: int) -> None:
    crops, label_b = crops_and_labels(Config(num_permutations=labels))
    chance = 1 / labels
    noise = (chance * (1 - chance) / (IMAGES - TRAINED)) ** 0.5
    assert accuracy(edge_pixels(crops), label_b, labels) < chance + 3 * noise
    # A little more is left here: of the random offsets, a few put two patches side by side.
    assert accuracy(seams(crops), label_b, labels) < chance + 0.1


def test_without_a_gap_they_would() -> None:
    crops, label_b = crops_and_labels(Config(num_permutations=4, patch_size=36))
    assert accuracy(seams(crops), label_b, 4) > 0.9
