"""Relative position: cut two patches of the image; the label is the position of the second relative to the first.

Doersch, Gupta and Efros 2015, "Unsupervised visual representation learning by context prediction": the center of a
3 x 3 grid and one of its eight neighbors. A gap and a jitter keep lines from continuing across patches. Colors are
dropped, because chromatic aberration of lenses grows toward the border and would reveal the position. At 224 pixels
the gap is 0.47 of a patch (paper: 0.5); at 32 pixels it is 0.33. Linear ImageNet top-1 of a ResNet-50: 40.4 %
(MMSelfSup, which turns two of three images gray and does not drop channels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from raysl.augment import SourceCrop, windows
from raysl.communication.device_copy import to_device
from raysl.errors import UserError
from raysl.fields import Bounds, Checked
from raysl.pretext import Color, Geometry, Transformed
from raysl.pretext._colors import grayscale
from raysl.rng import ImageRng

_MIN_PATCH = 4
_NUM_NEIGHBORS = 8
_CENTER = 4


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of relative position.

    Args:
        both_orders: put the neighbor first in half of the pairs, with the opposite label.
        color_drop: guard against chromatic aberration: "channels" keeps one random channel of each patch and fills the
            others with noise, "gray" keeps the luminance, "none" keeps all.
        drop_probability: share of the images with dropped colors, in 0..1.
        min_scale: smallest share of the image that the source crop shows.
        source_size: side of the source crop in pixels. None: image_size * 255 / 224.
        patch_size: side of a patch in pixels. None: 96 / 398 of the source.
        jitter: largest shift of a patch in pixels, on each axis and to either side. None: 7 / 96 of a patch, at
            least 1.
    """

    both_orders: bool = False
    color_drop: Literal["channels", "gray", "none"] = "channels"
    drop_probability: Annotated[float, Bounds(0, 1)] = 1.0
    min_scale: Annotated[float, Bounds(above=0, high=1)] = 0.6
    source_size: Annotated[int | None, Bounds(8, 2048)] = None
    patch_size: Annotated[int | None, Bounds(_MIN_PATCH, 1024)] = None
    jitter: Annotated[int | None, Bounds(0, 1024)] = None


class RelativePosition:
    """Two patches.

    Labels 0 to 7 are the positions around the first, row by row: 0 is the upper left, 7 the lower right.
    """

    num_crops = 2
    num_labels = _NUM_NEIGHBORS

    def __init__(self, config: Config, geometry: Geometry) -> None:
        self.config = config
        size = config.source_size
        size = round(geometry.image_size * 255 / 224) if size is None else size
        self.patch_size = round(size * 96 / 398) if config.patch_size is None else config.patch_size
        self.jitter = max(1, round(self.patch_size * 7 / 96)) if config.jitter is None else config.jitter
        # The space that three patches and their jitter leave.
        self.gap = (size - 3 * self.patch_size - 2 * self.jitter) // 2
        if self.patch_size < _MIN_PATCH or self.gap < max(1, 2 * self.jitter):
            raise UserError(
                f"relative_position with --view.image-size {geometry.image_size} has patches of {self.patch_size} "
                f"pixels with gaps of {self.gap} and a jitter of {self.jitter} in a source of {size}. A patch must "
                f"have at least {_MIN_PATCH} pixels, and a gap at least 1 and twice the jitter, so that patches never "
                "touch. Use larger images, or set source-size, patch-size and jitter of --relative-position."
            )
        self.source = SourceCrop(size, config.min_scale)
        # Colors are dropped last: a later recipe would mix the channels again.
        self.color: Color = "crops" if config.color_drop == "none" else "source"

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Cut two patches (b, 2, 3, s, s); labels are uniform."""
        on_host = image_rng.to(torch.device("cpu"))
        place_b = on_host.integers("place", _NUM_NEIGHBORS)[:, 0]
        neighbor_b = place_b + (place_b >= _CENTER)
        cell_b2 = torch.stack([torch.full_like(neighbor_b, _CENTER), neighbor_b], dim=1)
        label_b = place_b
        if self.config.both_orders:
            swapped_b = on_host.chance("order", 0.5)
            cell_b2 = torch.where(swapped_b[:, None], cell_b2.flip(1), cell_b2)
            label_b = torch.where(swapped_b, _NUM_NEIGHBORS - 1 - place_b, place_b)
        moved_b22 = on_host.integers("jitter", 2 * self.jitter + 1, 4).view(-1, 2, 2)
        pitch = self.patch_size + self.gap
        top_b2 = cell_b2 // 3 * pitch + moved_b22[..., 0]
        left_b2 = cell_b2 % 3 * pitch + moved_b22[..., 1]
        crops_b2chw = windows(images_bchw, top_b2, left_b2, self.patch_size)
        return Transformed(self._dropped(crops_b2chw, image_rng), to_device(label_b, images_bchw.device))

    def _dropped(self, crops_bpchw: Tensor, image_rng: ImageRng) -> Tensor:
        """Drop colors of the patches."""
        if self.config.color_drop == "none":
            return crops_bpchw
        gray = self.config.color_drop == "gray"
        dropped = grayscale(crops_bpchw) if gray else _to_one_channel(crops_bpchw, image_rng)
        chosen_b = image_rng.chance("drop", self.config.drop_probability).to(crops_bpchw.device)
        return torch.where(chosen_b.view(-1, 1, 1, 1, 1), dropped, crops_bpchw)

    def describe(self) -> dict[str, Any]:
        """Return sizes in pixels."""
        return {
            "source_size": self.source.size,
            "patch_size": self.patch_size,
            "gap": self.gap,
            "jitter": self.jitter,
        }


def _to_one_channel(crops_bpchw: Tensor, image_rng: ImageRng) -> Tensor:
    """Keep one random channel of each patch; fill the others with faint noise in the middle of the range."""
    b, p, c, h, w = crops_bpchw.shape
    kept_bp = image_rng.integers("kept", c, p)
    noise = image_rng.integers("noise", 3, p * h * w).view(b, p, 1, h, w) + 127
    channel = torch.arange(c, device=crops_bpchw.device)
    kept = kept_bp.to(crops_bpchw.device)[..., None] == channel
    return torch.where(kept[..., None, None], crops_bpchw, noise.to(crops_bpchw.device, torch.uint8))
