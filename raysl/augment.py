"""Crops, flips and colours: batched pure functions of uint8 images, with every random number from `Draws`.

The pixels of an image depend on the image and on its draws alone: not on its batch-mates, on the number of threads
or on the device. Sums of float32 products are made exact for that, by rounding coefficients to a fixed number of
binary places (`_fixed`), so that neither their order nor fused multiply-adds can change a result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import torch
from torch import Tensor

from raysl.errors import unknown
from raysl.rng import Draws, Integers

Floats = npt.NDArray[np.float64]

_ATTEMPTS = 10


@dataclass(frozen=True)
class SourceCrop:
    """A random part of an image, resized to a square: the "random resized crop" of Inception training.

    Args:
        size: side of the square in pixels.
        min_scale: smallest share of the image's area.
        max_scale: largest share of the image's area.
        min_ratio: smallest width / height.
        max_ratio: largest width / height.
    """

    size: int
    min_scale: float
    max_scale: float = 1.0
    min_ratio: float = 3 / 4
    max_ratio: float = 4 / 3

    def boxes(self, heights_b: Integers, widths_b: Integers, draws: Draws) -> Integers:
        """Where to cut: area uniform in the scales, ratio log-uniform, the first of ten attempts that fits.

        When none fits, the largest centred box whose ratio is allowed (as torchvision's RandomResizedCrop).

        Returns:
            int64 (b, 4): top, left, height, width, each box inside its image.
        """
        u = draws.uniform_array("box", 2 * _ATTEMPTS + 2)
        area = (heights_b * widths_b)[:, None] * (
            self.min_scale + (self.max_scale - self.min_scale) * u[:, :_ATTEMPTS]
        )
        log_min, log_max = math.log(self.min_ratio), math.log(self.max_ratio)
        ratio = np.exp(log_min + (log_max - log_min) * u[:, _ATTEMPTS:-2])
        widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (0 < widths) & (widths <= widths_b[:, None]) & (0 < heights) & (heights <= heights_b[:, None])
        first = np.argmax(fits, axis=1)[:, None]
        some = fits.any(axis=1)
        all_widths = np.clip(np.rint(heights_b * self.max_ratio).astype(np.int64), 1, widths_b)
        all_heights = np.clip(np.rint(widths_b / self.min_ratio).astype(np.int64), 1, heights_b)
        width = np.where(some, np.take_along_axis(widths, first, 1)[:, 0], all_widths)
        height = np.where(some, np.take_along_axis(heights, first, 1)[:, 0], all_heights)
        free_y, free_x = heights_b - height, widths_b - width
        top = np.where(some, (u[:, -2] * (free_y + 1)).astype(np.int64), free_y // 2)
        left = np.where(some, (u[:, -1] * (free_x + 1)).astype(np.int64), free_x // 2)
        return np.stack([top, left, height, width], axis=1)


@dataclass(frozen=True)
class Recipe:
    """How colours are changed and how often an image is mirrored.

    Args:
        hflip: probability of a mirror image.
        jitter: probability of colour jitter.
        brightness: largest relative change of brightness.
        contrast: largest relative change of contrast.
        saturation: largest relative change of saturation.
        hue: largest turn of the hue, as a share of the colour circle.
        gray: probability of losing all colour.
        photometric: probability of the block posterize, sharpness, solarize, autocontrast.
        blur: probability of a Gaussian blur.
    """

    hflip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray: float = 0.0
    photometric: float = 0.0
    blur: float = 0.0


_STRONG = Recipe(hflip=0.5, jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, gray=0.2, blur=0.5)

RECIPES = {
    "pirl": Recipe(
        hflip=0.5, jitter=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, gray=0.2, photometric=0.66
    ),
    "pirl+": _STRONG,
    "simclr": _STRONG,
    "mocov2": Recipe(
        hflip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, gray=0.2, blur=0.5
    ),
    "plain": Recipe(hflip=0.5),
    "none": Recipe(),
}


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is none.
    """
    if name not in RECIPES:
        raise unknown("augmentation recipe", name, RECIPES)
    return RECIPES[name]


def hflip(images_bchw: Tensor, draws: Draws, probability: float) -> Tensor:
    """Mirrors each image left to right with the given probability."""
    if probability == 0:
        return images_bchw
    mirrored = draws.chance("hflip", probability)[:, None, None, None]
    return torch.where(mirrored, images_bchw.flip(-1), images_bchw)


def photometric(images_bchw: Tensor, recipe: Recipe, draws: Draws) -> Tensor:
    """Changes the colours of each image."""
    return images_bchw
