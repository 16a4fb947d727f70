"""Targets on a coarse grid of cells over the image, and the head that decodes them from pooled features.

The papers decode from the spatial map before pooling. Here a backbone gives one vector for an image, as every other
method wants it, so the target is coarse and the position of each cell is the decoder's to know.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from raysl.errors import UserError

_CHANNELS = 64


def check(transform: str, grid: int, image_size: int) -> None:
    """Raises UserError unless the grid is even, at least 4, and every cell has a pixel at least."""
    if grid < 4 or grid % 2 or image_size < grid:
        raise UserError(
            f"{transform}.grid={grid} does not suit an image_size={image_size}. The grid is an even number of cells "
            "a side, 4 or more, with a pixel at least for each. Use larger images, or a grid such as 8."
        )


def means(values_bchw: Tensor, grid: int) -> Tensor:
    """float64 (b, c, grid, grid): the mean of every cell. Exact sums, so the same on every device.

    Args:
        values_bchw: whole numbers below 2**40.
        grid: cells per side. Where it does not divide the image, cells share the pixels on their borders.
    """
    return adaptive_avg_pool2d(values_bchw.double(), grid)


def decoder(width: int, channels: int, grid: int) -> nn.Module:
    """From pooled features (b, width) to (b, channels, grid, grid): a linear layer to half the grid, one upwards
    convolution, one convolution."""
    half = grid // 2
    return nn.Sequential(
        nn.Linear(width, _CHANNELS * half * half),
        nn.ReLU(inplace=True),
        nn.Unflatten(1, (_CHANNELS, half, half)),
        nn.ConvTranspose2d(_CHANNELS, _CHANNELS, 4, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(_CHANNELS, channels, 3, padding=1),
    )
