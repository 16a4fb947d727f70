"""Color order: a pretext transform of your own in one file. It permutes red, green and blue; the label is the order.

Lee, Hwang and Shin 2020, "Self-supervised label augmentation via input transformations", arXiv 1910.05872, where it
accompanies supervised training. A network that predicts the order has to know the usual colors of things; a network
that is invariant to it has to do without colors.

    raysl pretrain --data DATA --run RUN --plugin examples/color_order.py --method predict-color_order
    raysl pretrain --data DATA --run RUN --plugin examples/color_order.py --method pirl-color_order

The transform, the class and the flags (--color-order.orders) have the name of the file. `raysl/pretext/__init__.py`
lists what else a transform may have.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor

from raysl.fields import Checked
from raysl.pretext import Color, Geometry, Plain, Transformed
from raysl.rng import ImageRng


# The fields become flags, and a sweep may vary them.
@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of the order of colors.

    Args:
        orders: "all" six orders of the channels, or the three "cyclic" orders.
    """

    orders: Literal["all", "cyclic"] = "all"


class ColorOrder(Plain):
    """One crop of the image, with its channels in another order."""

    # A change of colors afterward would hide the order, so that no network could predict it.
    color: Color = "none"

    def __init__(self, config: Config, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        orders = list(permutations(range(3))) if config.orders == "all" else [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
        self.orders = torch.tensor(orders)  # (labels, 3); label 0 changes nothing
        self.num_labels = len(orders)

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Permute the channels of each image by the order of its label. A pure function of the two arguments."""
        # Each name is a choice of its own. `integers` gives (b, 1): one number for each image.
        label_b = image_rng.to(torch.device("cpu")).integers("order", self.num_labels)[:, 0]
        order_bc = self.orders[label_b].to(images_bchw.device)
        crops_bchw = images_bchw.gather(1, order_bc[:, :, None, None].expand_as(images_bchw))
        return Transformed(crops_bchw[:, None], label_b.to(images_bchw.device))  # (b, p, c, h, w) with p = 1
