"""Jigsaw: shuffle tiles of the image; the label is the permutation.

Noroozi and Favaro 2016, with the geometry of PIRL (Misra and van der Maaten 2020): a crop of at least 60 % of the
image at 255 pixels, nine cells of 85 pixels, and a patch of 64 pixels at a random position in each. Linear ImageNet
top-1 of a ResNet-50 in the PIRL paper: 45.7 % with predict, 63.6 % with PIRL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from raysl.augment import SourceCrop, windows
from raysl.communication.device_copy import to_device
from raysl.errors import UserError
from raysl.fields import Bounds, Checked, Range, Seed
from raysl.pretext import Color, Geometry, Transformed
from raysl.pretext._permutations import Criterion, permutation_set
from raysl.rng import ImageRng

_MIN_PATCH = 4
_MAX_ALL_TILES = 9


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of the jigsaw.

    Args:
        grid: cells per side; a jigsaw has grid * grid patches.
        num_permutations: size of the permutation set. None: all permutations for methods that compare views, such as
            pirl-jigsaw; 100 (or all, if fewer) for methods that predict the permutation, such as predict-jigsaw.
        criterion: rule that chooses the permutations: "max_min" maximizes the smallest Hamming distance between two of
            them, "max_avg" the average distance, "random" chooses at random.
        permutation_seed: seed of the random choices of `criterion`.
        min_scale: smallest share of the image's area that the crop shows from which the patches are cut (the source
            crop).
        per_patch_color: augment the colors of each patch independently instead of once for the whole crop.
        source_size: side of the source crop in pixels, a multiple of the grid. None: image_size * 255 / 224, rounded
            down to a multiple; the papers use 255 for images of 224 pixels.
        patch_size: side of a patch in pixels. None: 64 / 85 of the side of a cell, as in the papers, which cut patches
            of 64 pixels from cells of 85.
    """

    grid: Annotated[int, Bounds(2, 16), Range((2, 3))] = 3
    num_permutations: Annotated[
        int | None, Bounds(1, 362_880), Range((100, 701, 2000, 5000, 10_000), log=True)
    ] = None
    criterion: Criterion = "max_min"
    permutation_seed: Seed = 0
    min_scale: Annotated[float, Bounds(above=0, high=1)] = 0.6
    per_patch_color: bool = True
    source_size: Annotated[int | None, Bounds(8, 2048)] = None
    patch_size: Annotated[int | None, Bounds(_MIN_PATCH, 1024)] = None


class Jigsaw:
    """Patches at a random offset in their cells, in a random permutation per image.

    The label is the row of the permutation set: slot p shows cell `order_kp[label, p]`.
    """

    def __init__(self, config: Config, geometry: Geometry) -> None:
        tiles = config.grid**2
        self.grid = config.grid
        self.num_crops = tiles
        self.color: Color = "crops" if config.per_patch_color else "source"
        size, self.patch_size = _sizes(config, geometry)
        self.cell_size = size // config.grid
        self.source = SourceCrop(size, config.min_scale)
        count = config.num_permutations
        if count is None:
            count = _default_count(tiles, geometry.predicted)
        self.permutations = permutation_set(tiles, count, config.criterion, config.permutation_seed)
        self.num_labels = count

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Cut, jitter and shuffle the patches. Labels are uniform over the set."""
        device, image_rng = images_bchw.device, image_rng.to(torch.device("cpu"))
        label_b = image_rng.integers("order", self.num_labels)[:, 0]
        order_bp = torch.from_numpy(self.permutations.order_kp[label_b.numpy()]).long()
        num_offsets = self.cell_size - self.patch_size + 1
        offset_bp2 = image_rng.integers("offset", num_offsets, 2 * self.num_crops).view(-1, self.num_crops, 2)
        # The offset belongs to the cell, so that every permutation has the same patches.
        offset_bp2 = offset_bp2.gather(1, order_bp[..., None].expand(-1, -1, 2))
        top_bp = order_bp // self.grid * self.cell_size + offset_bp2[..., 0]
        left_bp = order_bp % self.grid * self.cell_size + offset_bp2[..., 1]
        return Transformed(windows(images_bchw, top_bp, left_bp, self.patch_size), to_device(label_b, device))

    def describe(self) -> dict[str, Any]:
        """Return sizes in pixels and facts of the permutation set."""
        return {
            "source_size": self.source.size,
            "cell_size": self.cell_size,
            "patch_size": self.patch_size,
            "num_permutations": self.num_labels,
            "permutations_digest": self.permutations.digest,
            "permutations_min_hamming": self.permutations.min_hamming,
            "permutations_mean_hamming": round(self.permutations.mean_hamming, 6),
        }


def _sizes(config: Config, geometry: Geometry) -> tuple[int, int]:
    """Return the sides of the source crop and of a patch."""
    grid = config.grid
    size = config.source_size
    if size is None:
        size = round(geometry.image_size * 255 / 224) // grid * grid
    if size % grid:
        raise UserError(
            f"--jigsaw.source-size is {size}; it must be a multiple of --jigsaw.grid, which is {grid}, such as "
            f"{max(1, size // grid) * grid}."
        )
    cell = size // grid
    patch = round(cell * 64 / 85) if config.patch_size is None else config.patch_size
    if not _MIN_PATCH <= patch <= cell:
        raise UserError(
            f"jigsaw with --jigsaw.grid {grid} and --view.image-size {geometry.image_size} has patches of {patch} "
            f"pixels in cells of {cell}. A patch must have at least {_MIN_PATCH} pixels and fit in its cell. Use "
            "larger images, a smaller grid, or set --jigsaw.source-size and --jigsaw.patch-size."
        )
    return size, patch


def _default_count(tiles: int, predicted: bool) -> int:
    total = math.factorial(tiles)
    if predicted:
        return min(100, total)
    if tiles > _MAX_ALL_TILES:
        raise UserError(
            f"A jigsaw of {tiles} tiles has {total:.1e} permutations, too many to list. Set --jigsaw.num-permutations, "
            "for example to 10000."
        )
    return total
