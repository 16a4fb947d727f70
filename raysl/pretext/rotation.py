"""Rotation: rotate the image by 0, 90, 180 or 270 degrees; the label is the angle.

Gidaris, Singh and Komodakis 2018, "Unsupervised representation learning by predicting image rotations" (RotNet). By
`turns`, a batch contains one random rotation of each image, as in VISSL, or all four, as in the authors' code. Linear
ImageNet top-1 of a ResNet-50 in the PIRL paper: 48.9 % with predict, 60.2 % with PIRL (400 epochs, 4,096 negatives).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raysl.communication.device_copy import to_device
from raysl.fields import Checked
from raysl.pretext import Geometry, Plain, Transformed
from raysl.rng import ImageRng


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of the rotation.

    Args:
        turns: "one" random rotation per visit of an image, or "all" four at once, each with its label (P = 4). "all"
            is four times the work of a step; the learning rate still follows the number of images.
    """

    turns: Literal["one", "all"] = "one"


class Rotation(Plain):
    """An exact rotation by transposing and mirroring: no interpolation reveals the angle."""

    num_labels = 4

    def __init__(self, config: Config, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.label_per_crop = config.turns == "all"
        self.num_crops = 4 if self.label_per_crop else 1

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Rotate each image counter-clockwise by 90 degrees times its label."""
        if self.label_per_crop:
            crops = torch.stack([torch.rot90(images_bchw, turn, (-2, -1)) for turn in range(4)], dim=1)
            label_p = torch.arange(4, device=images_bchw.device)
            return Transformed(crops, label_p.repeat(len(images_bchw), 1))
        device = images_bchw.device
        label_b = image_rng.to(torch.device("cpu")).integers("turn", 4)[:, 0]
        rows = [np.flatnonzero(label_b.numpy() == turn) for turn in range(4)]
        turned = [
            torch.rot90(images_bchw.index_select(0, to_device(row, device)), turn, (-2, -1))
            for turn, row in enumerate(rows)
        ]
        # Restore the order by reading: torch writes uint8 images by index slowly.
        crops_bchw = torch.cat(turned).index_select(0, to_device(np.argsort(np.concatenate(rows)), device))
        return Transformed(crops_bchw[:, None], to_device(label_b, device))
