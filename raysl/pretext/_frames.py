"""Parts that transforms of clips share."""

from __future__ import annotations

from torch import Tensor

from raysl.augment import SourceCrop
from raysl.pretext import Plain, Transformed
from raysl.rng import ImageRng


class OfFrames(Plain):
    """Base of a transform that shows whole frames, or parts of them. A still image is a clip of equal frames."""

    clip_columns: tuple[str, ...] = ("frames", "times")
    source: SourceCrop

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Return the image as every frame."""
        return Transformed(images_bchw[:, None].expand(-1, self.num_crops, -1, -1, -1).contiguous(), None)
