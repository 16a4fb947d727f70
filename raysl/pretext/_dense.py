"""The base of dense transforms: their target is a coarse grid of cells, decoded from pooled features.

The papers decode from the spatial map before pooling. Here the backbone returns one vector per image, as for every
other method, so the target is coarse and the decoder has to know the position of each cell.
"""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from raysl.errors import UserError
from raysl.fields import Bounds
from raysl.pretext import Color, Geometry, Plain

Grid = Annotated[int, Bounds(4, 64)]

_CHANNELS = 64


class DenseTransform(Plain):
    """A transform of one crop with a target on a grid of cells.

    Args:
        name: name of the transform, for errors.
        config: its hyperparameters; `grid`, the cells per side, is an even number of at least 4.

    Raises:
        UserError: the grid is odd or finer than the pixels.
    """

    color: Color = "source"

    def __init__(self, name: str, config: Any, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        grid: int = config.grid
        if grid % 2 or geometry.image_size < grid:
            raise UserError(
                f"--{name}.grid is {grid} and --view.image-size is {geometry.image_size}. The grid must be an even "
                "number of at least 4, and each of its cells must contain at least one pixel. Use larger images, or a "
                "grid such as 8."
            )
        self.grid = grid

    def cell_means(self, values_bchw: Tensor) -> Tensor:
        """Return the mean of every cell, float64 (b, c, grid, grid). It is exact, so it is equal on every device.

        Args:
            values_bchw: whole numbers below 2**40. Cells share border pixels where the grid does not divide the image.
        """
        return adaptive_avg_pool2d(values_bchw.double(), self.grid)

    def decoder(self, width: int, channels: int) -> nn.Module:
        """Build a decoder from pooled features (b, width) to (b, channels, grid, grid).

        A linear layer makes half of the grid, a transposed convolution all of it, and a convolution the output.
        """
        half = self.grid // 2
        return nn.Sequential(
            nn.Linear(width, _CHANNELS * half * half),
            nn.ReLU(inplace=True),
            nn.Unflatten(1, (_CHANNELS, half, half)),
            nn.ConvTranspose2d(_CHANNELS, _CHANNELS, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(_CHANNELS, channels, 3, padding=1),
        )
