"""Identity: a random crop of the image with random colors, the view of the instance-discrimination methods.

Wu et al. 2018 (NPID), He et al. 2020 (MoCo), Chen et al. 2020 (SimCLR). There is nothing to predict.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from raysl.pretext import Plain, Transformed
from raysl.rng import ImageRng


@dataclass(frozen=True)
class Config:
    """No hyperparameters: the crop follows from the geometry of the run."""


class Identity(Plain):
    """One crop of the size of an ordinary view."""

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Return the images unchanged."""
        return Transformed(images_bchw[:, None], None)
