"""The images of which BatchNorm takes its statistics, for probes that read images themselves."""

from __future__ import annotations

import torch
from torch import nn

from raysl.backbone import norm
from raysl.probes import _images


def test_the_order_of_the_images_does_not_matter() -> None:
    """Sorted images: dark ones, then bright ones. Within a batch of one kind, nothing would vary."""
    images_nchw = torch.cat([torch.full((129, 1, 2, 2), value) for value in (10.0, 50.0)])
    batches = _images.mixed([images_nchw[i : i + 43] for i in range(0, 258, 43)])
    assert sum(map(len, batches)) == 258
    assert min(map(len, batches)) >= 50
    layer = nn.BatchNorm2d(1)
    norm.reestimate(layer, batches)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert abs(float(layer.running_mean) - 30) < 3
    assert abs(float(layer.running_var) - 400) < 20


def test_one_image_has_no_statistics_and_no_batch_has_one_image() -> None:
    assert _images.mixed([torch.zeros(1, 3, 4, 4)]) == []
    for count in (2, 64, 65, 129):
        assert min(map(len, _images.mixed([torch.zeros(count, 1, 1, 1)]))) >= 2


def test_a_sample_is_spread_over_all_images() -> None:
    chosen_n = _images.sample(100_000)
    assert len(chosen_n) == norm.STATISTICS_IMAGES
    assert chosen_n.max() > 90_000
    assert len(_images.sample(1000, each=64)) == 32
