"""Parts that transforms of clips share."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from raysl.augment import SourceCrop
from raysl.pretext import Transformed
from raysl.rng import ImageRng


class OfFrames:
    """Base of a transform that shows whole frames, or parts of them. A still image is a clip of equal frames."""

    clip_columns: tuple[str, ...] = ("frames", "times")
    num_labels = 0
    color: Literal["crops", "source", "none"] = "crops"
    num_crops = 1
    source: SourceCrop

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Return the image as every frame."""
        return Transformed(images_bchw[:, None].expand(-1, self.num_crops, -1, -1, -1).contiguous(), None)

    def describe(self) -> dict[str, Any]:
        """Return no facts."""
        return {}
