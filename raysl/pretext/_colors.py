"""Convert 8-bit sRGB to gray and to CIE L*a*b* (D65) in exact steps: equal on every device and for every batch size.

The 8-bit form is that of OpenCV, which VISSL and the ImageNet benchmarks of colorization use: L * 255 / 100, a + 128,
b + 128.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.communication.device_copy import to_device

_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_RELATIVE = _XYZ / _XYZ.sum(1, keepdims=True)  # to the white point
_LIGHT_BITS, _WEIGHT_BITS = 16, 14


def _curve(t: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)


def _linear_light() -> Tensor:
    s = np.arange(256) / 255
    light = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    return torch.from_numpy(np.rint(light * (2**_LIGHT_BITS - 1)).astype(np.int32))


_LIGHT = _linear_light()
_WEIGHTS = torch.from_numpy(np.rint(_RELATIVE[1] * 2**_WEIGHT_BITS).astype(np.int32))
_LIGHTNESS = torch.from_numpy(
    np.rint((116 * _curve(np.linspace(0, 1, 2**_WEIGHT_BITS)) - 16) * 2.55).astype(np.uint8)
)


def grayscale(images: Tensor) -> Tensor:
    """Return the luminance of uint8 images (..., 3, h, w) in all three channels. Gray images stay unchanged."""
    per_mille = to_device(torch.tensor((299, 587, 114), dtype=torch.int32), images.device)[:, None, None]
    luminance = (images * per_mille).sum(-3, keepdim=True, dtype=torch.int32).add_(500) // 1000
    return luminance.to(torch.uint8).expand_as(images).contiguous()


def linear(images_bchw: Tensor) -> Tensor:
    """Return the linear light of uint8 values: int32 of the same shape, 0 to 65535."""
    return _looked_up(_LIGHT, images_bchw)


def lightness(light_bchw: Tensor) -> Tensor:
    """Return the lightness L of `linear` light: uint8 (b, 1, h, w), 0 to 255."""
    weighted = light_bchw * to_device(_WEIGHTS, light_bchw.device)[:, None, None]
    luminance = weighted.sum(1, keepdim=True, dtype=torch.int32) >> _LIGHT_BITS
    return _looked_up(_LIGHTNESS, luminance)


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    if index.device.type == "cpu":
        return torch.from_numpy(table.numpy()[index.numpy()])  # seven times faster than torch
    return to_device(table, index.device)[index.long()]


def chroma(light_bchw: Tensor) -> Tensor:
    """Return a + 128 and b + 128 of float64 linear light 0 to 65535: uint8 (b, 2, h, w)."""
    matrix = to_device(_RELATIVE / (2**_LIGHT_BITS - 1), light_bchw.device)
    xyz = (light_bchw[:, None] * matrix[:, :, None, None]).sum(2)
    cut = (6 / 29) ** 3
    f = torch.where(xyz > cut, xyz.clamp(min=cut) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    ab = torch.stack([500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], dim=1)
    return (ab + 128).round().clamp(0, 255).to(torch.uint8)


def gamut(step: int) -> Tensor:
    """Return the points of a square grid in the ab plane that are nearest to some sRGB color: float32 (q, 2).

    Args:
        step: distance between the points, in units of a and b. 10 gives 259 points (the paper has 313).
    """
    light = _LIGHT[torch.arange(0, 256, 5)].double()
    cube_n3 = torch.cartesian_prod(light, light, light)
    ab_n2 = chroma(cube_n3[:, :, None, None])[:, :, 0, 0].double() - 128
    nearest_q2: Tensor = torch.unique((ab_n2 / step).round(), dim=0)
    return nearest_q2.float() * step
