"""Send features to a GPU that cannot hold all of them, in tiles of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysl.fields import Bounds, Checked


@dataclass(frozen=True)
class Tiling(Checked):
    """Choose how many rows of features lie on a GPU at a time. No flag, because results differ by rounding only.

    Args:
        share: features that take a larger share of the GPU's memory stay in the memory of the host, and are sent in
            tiles of an eighth of this share whenever they are needed.
    """

    share: Annotated[float, Bounds(above=0, high=0.9, hint="scores and gradients need memory too")] = 0.5

    def rows(self, features_nd: NDArray[np.float32], device: torch.device) -> int:
        """Return the rows of a tile, at least 1; all rows if they fit, and on the CPU."""
        if device.type == "cpu":
            return len(features_nd)
        allowed_bytes = self.share * torch.cuda.mem_get_info(device)[1]
        if features_nd.nbytes <= allowed_bytes:
            return len(features_nd)
        return max(1, int(allowed_bytes / 8 / features_nd[0].nbytes))


TILING = Tiling()


@dataclass(frozen=True)
class Tiles:
    """Send features to a device in tiles of rows."""

    device: torch.device
    rows: int

    def __call__(self, features_nd: Tensor) -> Iterator[Tensor]:
        """Yield tiles (rows, d) on the device; no copies of what is there already."""
        return (tile_nd.to(self.device) for tile_nd in torch.split(features_nd, self.rows))
