"""Patch grid: cut the image into a grid of overlapping patches, for CPC.

Oord, Li and Vinyals 2018, "Representation learning with contrastive predictive coding": 7 x 7 patches of 64 pixels
from a crop of 256, each overlapping the next by half. Henaff et al. 2020 (version 2): 6 x 6 patches of 80 pixels from
a crop of 260 (`grid` 6, `overlap` 0.55, `source_size` 260). There is no label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from raysl.augment import SourceCrop, windows
from raysl.errors import UserError
from raysl.fields import Bounds, Checked
from raysl.pretext import Color, Geometry, Plain, Transformed
from raysl.rng import ImageRng

_MIN_PATCH = 4


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of the patch grid.

    Args:
        grid: patches per side; an image has grid * grid patches.
        overlap: share of a patch's side that overlaps with the next patch, from 0 to below 1.
        min_scale: smallest share of the image that the source crop shows.
        per_patch_color: augment the colors of each patch by itself, and not of the source as a whole.
        source_size: largest side of the grid in pixels. None: image_size * 256 / 224.
    """

    grid: Annotated[int, Bounds(2, 32)] = 7
    overlap: Annotated[float, Bounds(0, below=1)] = 0.5
    min_scale: Annotated[float, Bounds(above=0, high=1)] = 0.6
    per_patch_color: bool = True
    source_size: Annotated[int | None, Bounds(8, 2048)] = None


class PatchGrid(Plain):
    """Patches row by row. The source crop has the size that they cover."""

    def __init__(self, config: Config, geometry: Geometry) -> None:
        self.columns = config.grid
        self.num_crops = config.grid**2
        self.color: Color = "crops" if config.per_patch_color else "source"
        size = config.source_size
        size = round(geometry.image_size * 256 / 224) if size is None else size
        # Add a little, because 260 / (1 + 5 * 0.45) would round down to patches of 79.
        self.patch_size = int(size / (1 + (config.grid - 1) * (1 - config.overlap)) + 1e-6)
        self.stride = max(1, round(self.patch_size * (1 - config.overlap)))
        covered = self.patch_size + (config.grid - 1) * self.stride
        if self.patch_size < _MIN_PATCH:
            raise UserError(
                f"patch_grid with --view.image-size {geometry.image_size} has {config.grid} x {config.grid} patches of "
                f"{self.patch_size} pixels in a source of {size}; a patch must have at least {_MIN_PATCH}. Use larger "
                "images, a smaller --patch-grid.grid, more --patch-grid.overlap, or set --patch-grid.source-size."
            )
        self.source = SourceCrop(covered, config.min_scale)

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Cut patches (b, grid * grid, 3, s, s)."""
        place_p = torch.arange(self.num_crops).expand(len(images_bchw), -1)
        top_bp, left_bp = (place_p // self.columns * self.stride, place_p % self.columns * self.stride)
        return Transformed(windows(images_bchw, top_bp, left_bp, self.patch_size), None)

    def describe(self) -> dict[str, Any]:
        """Return sizes in pixels."""
        return {"source_size": self.source.size, "patch_size": self.patch_size, "stride": self.stride}
