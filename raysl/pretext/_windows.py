"""Cut patches out of a batch of images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raysl.communication.device_copy import to_device


def windows(images_bchw: Tensor, top_bp: Tensor, left_bp: Tensor, size: int) -> Tensor:
    """Cut square windows out of every image: (b, p, c, size, size).

    Args:
        images_bchw: uint8, on any device.
        top_bp: int64, upper edges, on the CPU.
        left_bp: int64, left edges, on the CPU.
        size: side of a window in pixels.
    """
    device = images_bchw.device
    image = torch.arange(len(images_bchw))[:, None]
    if device.type == "cpu":
        # The same as below and ten times faster.
        views = np.lib.stride_tricks.sliding_window_view(images_bchw.numpy(), (size, size), (2, 3))
        return torch.from_numpy(views[image.numpy(), :, top_bp.numpy(), left_bp.numpy()])
    views_bcyxhw = images_bchw.unfold(2, size, 1).unfold(3, size, 1)
    return views_bcyxhw[to_device(image, device), :, to_device(top_bp, device), to_device(left_bp, device)]
