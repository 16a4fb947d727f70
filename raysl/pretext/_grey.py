"""Images without their colours."""

from __future__ import annotations

import torch
from torch import Tensor


def grey(images: Tensor) -> Tensor:
    """uint8 (..., 3, h, w): the luminance in all three channels. Grey images stay as they are."""
    per_mille = torch.tensor((299, 587, 114), dtype=torch.int32, device=images.device)[:, None, None]
    luminance = (images * per_mille).sum(-3, keepdim=True, dtype=torch.int32).add_(500) // 1000
    return luminance.to(torch.uint8).expand_as(images).contiguous()
