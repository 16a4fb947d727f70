"""Inpainting: the image with holes; the target is what was there.

With M one in the cells that are missing, x their colours and F what is decoded from the image with holes,

    L = sum over cells of M * (x - F)^2 / sum of M                                        (eq. 1)

Pathak et al. 2016, "Context encoders: feature learning by inpainting". Reconstruction loss only, as the paper itself
has it where features are learned: the adversarial loss, which sharpens pictures, and the tenfold weight on the border
of the hole are left out. The target is the coarse colours of the missing cells, decoded from pooled features, where
the paper decodes all pixels from the spatial map. Published with an AlexNet and random regions: 56.5 % on Pascal VOC
classification and 44.5 % mAP on detection, fine-tuned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from raysl.augment import SourceCrop
from raysl.errors import UserError
from raysl.fields import Range
from raysl.pretext import Geometry, Transformed, _cells
from raysl.rng import ImageRng

# The mean colour of ImageNet: nothing of the image itself may show in a hole.
_FILL = (124, 116, 104)


@dataclass(frozen=True)
class Config:
    """Hyperparameters of inpainting.

    Args:
        mode: "random" punches square blocks at random places, better for learning features; "centre" one square.
        share: of the image that is missing, at most: holes are whole cells, and random blocks may overlap.
        blocks: how many, when they are random.
        grid: cells per side of the target, an even number.
    """

    mode: Literal["random", "centre"] = "random"
    share: Annotated[float, Range((0.125, 0.25, 0.5))] = 0.25
    blocks: int = 4
    grid: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.8:
            raise UserError(f"inpainting.share is {self.share}; it must be above 0 and at most 0.8.")
        if self.blocks < 1:
            raise UserError(f"inpainting.blocks is {self.blocks}; it must be at least 1.")


class Inpainting:
    """The image with missing cells in the mean colour, and the mean colour of every cell as the target."""

    num_crops = 1
    num_labels = 0
    colour: Literal["crops", "source", "none"] = "source"

    def __init__(self, config: Config, geometry: Geometry) -> None:
        _cells.check("inpainting", config.grid, geometry.image_size)
        self.config = config
        self.source = SourceCrop(geometry.image_size, geometry.min_scale)
        self.block = _block_cells(config)

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """The crop (b, 1, 3, h, w) with holes; the target, uint8 (b, 4, grid, grid), is the colour of every cell,
        and 255 where it is missing."""
        grid, device = self.config.grid, images_bchw.device
        missing_bgg = self._missing(image_rng).to(device)
        cell = torch.arange(images_bchw.shape[-1], device=device) * grid // images_bchw.shape[-1]
        hole_b1hw = missing_bgg[:, cell][:, :, cell][:, None]
        fill = torch.tensor(_FILL, dtype=torch.uint8, device=device)[:, None, None]
        colours_b3gg = (_cells.means(images_bchw, grid) + 0.5).to(torch.uint8)
        target_b4gg = torch.cat([colours_b3gg, missing_bgg[:, None].to(torch.uint8) * 255], dim=1)
        return Transformed(torch.where(hole_b1hw, fill, images_bchw)[:, None], target_b4gg)

    def _missing(self, image_rng: ImageRng) -> Tensor:
        """bool (b, grid, grid)."""
        free = self.config.grid - self.block
        if self.config.mode == "centre":
            corner_bk2 = torch.full((len(image_rng.indices_b), 1, 2), free // 2)
        else:
            corner_bk2 = (
                image_rng.integers("corners", free + 1, 2 * self.config.blocks)
                .cpu()
                .view(-1, self.config.blocks, 2)
            )
        cell = torch.arange(self.config.grid)
        covered_bk2g = (corner_bk2[..., None] <= cell) & (cell < corner_bk2[..., None] + self.block)
        return (covered_bk2g[:, :, 0, :, None] & covered_bk2g[:, :, 1, None, :]).any(1)

    def head(self, width: int) -> nn.Module:
        """Colours of every cell, -1 to 1."""
        return _cells.decoder(width, 3, self.config.grid)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The squared error over the missing cells of each image, in units of half the range of a pixel."""
        colours_b3gg, missing_b1gg = target[:, :3] / 127.5 - 1, target[:, 3:] / 255
        error_b = ((output - colours_b3gg).square() * missing_b1gg).mean(1).sum((1, 2))
        return (error_b / missing_b1gg.sum((1, 2, 3))).mean()

    def describe(self) -> dict[str, Any]:
        """Side of a block, in cells."""
        return {"block_cells": self.block}


def _block_cells(config: Config) -> int:
    """Side of a block in cells: the largest with which the share is not exceeded, but a block there is."""
    if config.mode == "centre":
        # As many cells are left on one side as on the other.
        margin = math.ceil(config.grid * (1 - math.sqrt(config.share)) / 2 - 1e-9)
        return max(2, config.grid - 2 * margin)
    return max(1, math.floor(config.grid * math.sqrt(config.share / config.blocks) + 1e-9))
