"""Send features to a GPU that cannot hold all of them, in tiles of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Features that take a larger share of the GPU's memory, in which scores and gradients need room too, stay in the memory
# of the host. Tiles of an eighth of this share are sent whenever they are needed. Results differ by rounding only.
_SHARE = 0.5


def tile_rows(features_nd: NDArray[np.float32], device: torch.device) -> int:
    """Return how many rows of features lie on a device at a time: all if they fit, and on the CPU; at least 1."""
    if device.type == "cpu":
        return len(features_nd)
    allowed_bytes = _SHARE * torch.cuda.mem_get_info(device)[1]
    if features_nd.nbytes <= allowed_bytes:
        return len(features_nd)
    return max(1, int(allowed_bytes / 8 / features_nd[0].nbytes))


@dataclass(frozen=True)
class Tiles:
    """Send features to a device in tiles of rows."""

    device: torch.device
    rows: int

    def __call__(self, features_nd: Tensor) -> Iterator[Tensor]:
        """Yield tiles (rows, d) on the device; no copies of what is there already."""
        return (tile_nd.to(self.device) for tile_nd in torch.split(features_nd, self.rows))
