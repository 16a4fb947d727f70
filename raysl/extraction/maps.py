"""Maps of layers: one feature vector for each place of an image, for probes of every place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from raysl.backbone import norm
from raysl.extraction.encoders import Encoder, Trainable
from raysl.extraction.layers import POOLED, EncodeMaps, frozen_maps


def load_maps(
    source: Encoder, device: torch.device, layers: Sequence[str], views: Iterable[Tensor] | None = None
) -> EncodeMaps:
    """Return the function from uint8 images (b, 3, s, s) on the device to maps (b, d, h, w) by layer.

    The map of raw pixels is the image, in -0.5 .. 0.5.

    Args:
        source: any encoder.
        device: where it computes.
        layers: layers of the encoder; see `raysl.extraction.layers.frozen_maps`.
        views: batches of uint8 images that BatchNorm takes its statistics from; None keeps those of training.
    """
    if not isinstance(source, Trainable):
        return lambda images_bchw: {POOLED: images_bchw.float() / 255 - 0.5}
    network = source.network().to(device)
    if views is not None:
        norm.reestimate(network, (images_bchw.to(device) for images_bchw in views))
    return frozen_maps(network, device, layers)
