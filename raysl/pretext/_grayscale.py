"""Convert images to grayscale."""

from __future__ import annotations

import torch
from torch import Tensor

from raysl.communication.device_copy import to_device


def grayscale(images: Tensor) -> Tensor:
    """Return the luminance of uint8 images (..., 3, h, w) in all three channels. Gray images stay unchanged."""
    per_mille = to_device(torch.tensor((299, 587, 114), dtype=torch.int32), images.device)[:, None, None]
    luminance = (images * per_mille).sum(-3, keepdim=True, dtype=torch.int32).add_(500) // 1000
    return luminance.to(torch.uint8).expand_as(images).contiguous()
