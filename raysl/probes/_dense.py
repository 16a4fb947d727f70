"""What the probes of places share: maps of frozen layers of images that the probe itself reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from raysl import rng
from raysl.backbone import norm
from raysl.backbone.network import Backbone
from raysl.errors import UserError
from raysl.extraction import EncodeMaps, load_maps
from raysl.probes import REESTIMATED, Subject
from raysl.probes._ridge import HELD_OUT

_BATCH = 64


def encode_maps(subject: Subject, views: Iterator[Tensor], device: torch.device) -> EncodeMaps:
    """Return the function from images to maps of the layers of a subject.

    Args:
        subject: the encoder, its layers and where BatchNorm takes its statistics from.
        views: batches of the images that the probe learns from, for these statistics.
        device: where it computes.
    """
    wanted = islice(views, max(1, norm.STATISTICS_IMAGES // _BATCH))
    return load_maps(
        subject.encoder, device, subject.layers, wanted if subject.bn_statistics == REESTIMATED else None
    )


def cell_offset(backbone: Backbone, size: int) -> float:
    """Return where in its cell a place of the map looks, as a share of the cell: 0 for the corner, 0.5 for the middle.

    Strided convolutions with odd kernels and padding look at the corner: in a ResNet, place i of a map with stride s
    sees the surroundings of pixel s * i. A patch embedding looks at the middle. The gradient of the middle row says it.

    Args:
        backbone: in eval mode.
        size: side of the images in pixels.
    """
    device = backbone.mean.device
    noise_bchw = 255 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    noise_bchw = noise_bchw.to(device).requires_grad_()
    maps_bdhw = backbone.maps(noise_bchw)
    row, stride = maps_bdhw.shape[2] // 2, size / maps_bdhw.shape[2]
    (gradient_bchw,) = torch.autograd.grad(maps_bdhw[:, :, row].square().sum(), noise_bchw)
    weight_h = gradient_bchw.abs().sum(dim=(0, 1, 3))
    centre = float((weight_h * torch.arange(size, device=device)).sum() / weight_h.sum())
    return 0.0 if centre < (row + 0.25) * stride else 0.5


def batches(count: int) -> Iterator[slice]:
    """Yield slices that cover `count` images in batches of equal size but for the last."""
    for first in range(0, count, _BATCH):
        yield slice(first, min(first + _BATCH, count))


def held_out(name: str, count: int) -> list[bool]:
    """Return for each image to learn from if it chooses the penalty of the regression, at random; never all of them."""
    order_n = rng.generator(name, "held out").permutation(count)
    chosen = np.zeros(count, dtype=bool)
    chosen[order_n[: int(HELD_OUT * count)]] = True
    return [bool(one) for one in chosen]


def check_finite(name: str, maps: Sequence[Tensor]) -> None:
    """Raise UserError if the maps of a network are not finite."""
    if not all(torch.isfinite(one).all() for one in maps):
        raise UserError(
            f"The maps that the probe {name} reads are not all finite: training has diverged. Probe an earlier "
            "checkpoint, or train again with a lower --optim.lr."
        )
