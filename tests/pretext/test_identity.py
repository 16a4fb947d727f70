"""The image itself."""

from __future__ import annotations

import numpy as np
import torch

from raysl.pretext import Geometry
from raysl.pretext.identity import Config, Identity
from raysl.rng import ImageRng


def test_the_crop_is_the_image() -> None:
    made = Identity(Config(), Geometry(32, min_scale=0.2))
    assert (made.source.size, made.source.min_scale) == (32, 0.2)
    x = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32).to(torch.uint8)
    result = made.transform(x, ImageRng(0, np.zeros(2, np.int64), np.arange(2)))
    assert torch.equal(result.crops_bpchw[:, 0], x)
    assert result.target is None
