"""Multi-crop: a small crop of a small part of the image, for objectives that compare many crops.

Caron et al. 2020, "Unsupervised learning of visual features by contrasting cluster assignments" (SwAV): beside two
ordinary views of 224 pixels, several crops of 96 pixels show 5 % to 14 % of the image (DINO: 5 % to 40 %). The crops
are cut from the decoded image, so they are resized once. "dino-multi_crop" and "swav-multi_crop" take several of them,
by `--dino.crops` and `--swav.crops`. There is nothing to predict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from raysl.augment import SourceCrop
from raysl.errors import UserError
from raysl.fields import Bounds, Checked
from raysl.pretext import Geometry
from raysl.pretext.identity import Identity


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of multi-crop.

    Args:
        size: side of the crop in pixels. None: image_size * 96 / 224, at least 8.
        min_scale: smallest share of the image's area, in 0..1.
        max_scale: largest share of the image's area, in 0..1 (SwAV: 0.14, DINO: 0.4).
    """

    size: Annotated[int | None, Bounds(8, 2048)] = None
    min_scale: Annotated[float, Bounds(above=0, high=1)] = 0.05
    max_scale: Annotated[float, Bounds(above=0, high=1)] = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_scale > self.max_scale:
            raise UserError(
                f"--multi-crop.min-scale is {self.min_scale} and --multi-crop.max-scale is {self.max_scale}; the "
                "largest share must not be below the smallest."
            )


class MultiCrop(Identity):
    """One small crop per view; the objective asks for several views."""

    def __init__(self, config: Config, geometry: Geometry) -> None:
        size = max(8, round(geometry.image_size * 96 / 224)) if config.size is None else config.size
        self.source = SourceCrop(size, config.min_scale, config.max_scale)

    def describe(self) -> dict[str, Any]:
        """Return the side of a crop in pixels."""
        return {"size": self.source.size}
