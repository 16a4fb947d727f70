"""A small run for an objective: its trunk, what it may know, and a batch of random views."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raysl import pretext
from raysl.objectives import Setup
from raysl.pretext import Geometry, jigsaw
from raysl.stream.plan import Rows
from raysl.stream.reader import Batch
from raysl.trunk import Trunk, TrunkConfig, build

N = 64


def setup(transform: str = "", num_classes: int = 0) -> tuple[Trunk, Setup]:
    """A trunk whose images do not see each other, of equal weights in every call."""
    torch.manual_seed(0)
    geometry = Geometry(image_size=16)
    parts = {"jigsaw": jigsaw.Config(grid=2, patch_size=6)}
    trunk = build(TrunkConfig(norm="group"))
    return trunk, Setup(
        pretext=pretext.build(transform, parts, geometry) if transform else None,
        identity=pretext.build("identity", {}, geometry),
        width=trunk.width,
        num_images=N,
        num_classes=num_classes,
        seed=0,
        trunk=trunk,
    )


def batch(objective: Any, b: int = 4, step: int = 0) -> Batch:
    """Random views of the images 0, 7, 14, ... as the objective asks for them."""
    generator = torch.Generator().manual_seed(step)
    views = {}
    for name, transform in objective.views.items():
        side = 6 if transform.num_crops > 1 else 16
        shape = (b, transform.num_crops, 3, side, side)
        views[name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    rows = Rows((np.arange(b) + step * b) * 7 % N, np.zeros(b, np.int64))
    return Batch(step, rows, torch.arange(b) % 4, views, {})
