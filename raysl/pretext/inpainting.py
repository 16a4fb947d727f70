"""Inpainting: show the image with holes; the target is the missing part.

With M = 1 in the missing cells, x their colors and F the colors decoded from the image with holes,

    L = sum over cells of M * (x - F)^2 / sum of M                                        (eq. 1)

Pathak et al. 2016, "Context encoders: feature learning by inpainting". Only the reconstruction loss is used, as in the
paper's feature learning; the adversarial loss, which sharpens images, and the tenfold weight on the border of the hole
are left out. The target is the coarse color of the missing cells, decoded from pooled features; the paper decodes all
pixels from the spatial map. Published with an AlexNet and random regions: 56.5 % on Pascal VOC classification and
44.5 % mAP on detection, fine-tuned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from raysl.communication.device_copy import to_device
from raysl.fields import Bounds, Checked, Range
from raysl.pretext import Geometry, Transformed
from raysl.pretext._dense import DenseTransform, Grid
from raysl.rng import ImageRng

# The mean color of ImageNet: a hole must not show anything of the image.
_FILL = (124, 116, 104)


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of inpainting.

    Args:
        mode: "random" removes square blocks at random positions, which is better for features; "center" one square.
        share: largest share of the image that is missing; holes are whole cells, and random blocks may overlap.
        blocks: number of random blocks.
        grid: cells per side of the target, an even number.
    """

    mode: Literal["random", "center"] = "random"
    share: Annotated[float, Bounds(above=0, high=0.8), Range((0.125, 0.25, 0.5))] = 0.25
    blocks: Annotated[int, Bounds(1, 256)] = 4
    grid: Grid = 8


class Inpainting(DenseTransform):
    """The image with missing cells filled, and the mean color of every cell as the target."""

    def __init__(self, config: Config, geometry: Geometry) -> None:
        super().__init__("inpainting", config, geometry)
        self.block = _block_cells(config)

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Return crops (b, 1, 3, h, w) with holes; the target, uint8 (b, 4, grid, grid), is the color of every cell
        and a mask with 255 where it is missing."""
        grid, device = self.config.grid, images_bchw.device
        missing_bgg = to_device(self._missing(image_rng.to(torch.device("cpu"))), device)
        cell = torch.arange(images_bchw.shape[-1], device=device) * grid // images_bchw.shape[-1]
        hole_b1hw = missing_bgg[:, cell][:, :, cell][:, None]
        fill = to_device(torch.tensor(_FILL, dtype=torch.uint8), device)[:, None, None]
        colors_b3gg = (self.cell_means(images_bchw) + 0.5).to(torch.uint8)
        target_b4gg = torch.cat([colors_b3gg, missing_bgg[:, None].to(torch.uint8) * 255], dim=1)
        return Transformed(torch.where(hole_b1hw, fill, images_bchw)[:, None], target_b4gg)

    def _missing(self, image_rng: ImageRng) -> Tensor:
        """Return the missing cells, bool (b, grid, grid)."""
        free = self.config.grid - self.block
        if self.config.mode == "center":
            corner_bk2 = torch.full((len(image_rng.indices_b), 1, 2), free // 2)
        else:
            corner_bn = image_rng.integers("corners", free + 1, 2 * self.config.blocks)
            corner_bk2 = corner_bn.view(-1, self.config.blocks, 2)
        cell = torch.arange(self.config.grid)
        covered_bk2g = (corner_bk2[..., None] <= cell) & (cell < corner_bk2[..., None] + self.block)
        return (covered_bk2g[:, :, 0, :, None] & covered_bk2g[:, :, 1, None, :]).any(1)

    def head(self, width: int) -> nn.Module:
        """Build a head that outputs the color of every cell, -1 to 1."""
        return self.decoder(width, 3)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Compute the squared error of the missing cells of each image, in units of half the range of a pixel."""
        colors_b3gg, missing_b1gg = target[:, :3] / 127.5 - 1, target[:, 3:] / 255
        error_b = ((output - colors_b3gg).square() * missing_b1gg).mean(1).sum((1, 2))
        return (error_b / missing_b1gg.sum((1, 2, 3))).mean()

    def describe(self) -> dict[str, Any]:
        """Return the side of a block in cells."""
        return {"block_cells": self.block}


def _block_cells(config: Config) -> int:
    """Return the side of a block in cells: the largest that does not exceed the share, at least 1."""
    if config.mode == "center":
        # Both sides keep the same number of cells.
        margin = math.ceil(config.grid * (1 - math.sqrt(config.share)) / 2 - 1e-9)
        return max(2, config.grid - 2 * margin)
    return max(1, math.floor(config.grid * math.sqrt(config.share / config.blocks) + 1e-9))
