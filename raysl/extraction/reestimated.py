"""Encoders whose BatchNorm takes the statistics of the images that it encodes, not those of its training views.

The running statistics of pretraining mix the views of a method: patches and whole images in a jigsaw, or patches alone.
They move the features of whole images, for some methods more than for others, so an evaluation re-estimates them on
unlabeled training images in the evaluation view.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysl import rng
from raysl.backbone import norm
from raysl.backbone.network import Backbone
from raysl.dataset import DataSet
from raysl.extraction.encoders import Encoder, NetworkEncoder
from raysl.extraction.layers import POOLED, Encode, EncodeMaps, frozen, frozen_maps
from raysl.stream import decode

_BATCH = 128


def load(source: Encoder, views: Iterable[Tensor], device: torch.device, layers: Sequence[str]) -> Encode:
    """Return `source.load(device, layers)` with BatchNorm statistics of these views.

    There is at least one batch, uint8 (b, 3, s, s), all of about the same size. Raw pixels read no view.
    """
    if not isinstance(source, NetworkEncoder):
        return source.load(device, layers)
    network = source.network().to(device)
    norm.reestimate(network, (images_bchw.to(device) for images_bchw in views))
    return frozen(network, device, layers, by_batch=False)


def load_maps(
    source: Encoder, device: torch.device, layers: Sequence[str], views: Iterable[Tensor] | None = None
) -> EncodeMaps:
    """Return the function from uint8 images (b, 3, s, s) on the device to maps (b, d, h, w) by layer.

    The map of raw pixels is the image, in -0.5 .. 0.5. BatchNorm takes its statistics from `views`, or keeps those of
    training. For `layers` see `raysl.extraction.layers.frozen_maps`.
    """
    if not isinstance(source, NetworkEncoder):
        return lambda images_bchw: {POOLED: images_bchw.float() / 255 - 0.5}
    network = source.network().to(device)
    if views is not None:
        norm.reestimate(network, (images_bchw.to(device) for images_bchw in views))
    return frozen_maps(network, device, layers)


@dataclass(frozen=True)
class Reestimated:
    """An encoder with BatchNorm statistics of a random sample of a data set, whose labels are not used."""

    source: Encoder
    images: DataSet
    image_size: int  # side of the evaluation view in pixels

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def layers(self) -> tuple[str, ...]:
        return self.source.layers

    def identity(self) -> dict[str, Any]:
        """Return the identity of the encoder with that of the sample."""
        sample = [self.images.manifest.fingerprint, self.image_size, norm.STATISTICS_IMAGES, "random order"]
        return {**self.source.identity(), "bn_statistics": sample}

    def load(self, device: torch.device, layers: Sequence[str], by_batch: bool = False) -> Encode:
        """Return the function of the encoder; see `Encoder.load`. Statistics `by_batch` need no estimate."""
        if by_batch or self.images.num_images < 2:
            return self.source.load(device, layers, by_batch)
        return load(self.source, self._views(), device, layers)

    def network(self) -> Backbone:
        """Return the network of the encoder with the statistics of the sample, on the CPU."""
        assert isinstance(self.source, NetworkEncoder)
        network = self.source.network()
        if self.images.num_images > 1:
            norm.reestimate(network, self._views())
        return network

    def _views(self) -> Iterator[Tensor]:
        # Not in stored order: neighbors are often of one class, and vary less than all images do.
        order_n = rng.generator("bn statistics").permutation(self.images.num_images)
        chosen_n = order_n[: norm.STATISTICS_IMAGES]
        images = self.images.read(chosen_n, ("image",)).column("image").to_pylist()
        for some in np.array_split(np.arange(len(images)), math.ceil(len(images) / _BATCH)):
            yield decode.evaluation_views([images[i] for i in some], self.image_size)
